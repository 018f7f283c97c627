"""Where differences between claims and figures come from; shown for claims that do not hold entirely."""

FAMO_FRONT = (
    "a start that is not reached within the steps is not stuck for good; PCGrad leaves the valley late and is still on "
    "its way. The paper's text names five starts of which its script has three, and these are the script's."
)
NASH_START = (
    "CAGrad is solved exactly here, while the script minimises numerically and adds small constants, which may be what "
    "keeps it in the valley longer. The FAMO paper, whose script takes 50 000 steps, has CAGrad on the front from all "
    "five starts, too."
)
NASH_PLACES = "ends depend on where a path happens to meet the front."
CAGRAD_MINIMUM = "CAGrad creeps along the front, and through the valleys; more steps would tell."
CONICGRAD = (
    "on the front no direction helps both tasks, so that Nash-MTL's is zero and it stays where it arrives; only the "
    "symmetric start, with equal scales, meets the front at the minimum. The published Nash-MTL keeps its last weights "
    "where its solver fails, which may carry it along the front. The figure does not say which scales it has. "
    "ConicGrad itself was not run."
)
VALLEYS = "how far it gets in the given steps depends on how it jumps between the walls."
SUPPRESSED = (
    "Adam gives each head a step size of its own, and the trunk that the large task learns serves the small one."
)
NORMALISED = "the paper leaves steps, learning rate and batches open."
UNCERTAIN = (
    "the paper leaves steps, learning rate and batches open; its uncertainty weights grow too large late in training."
)
PINN = "the networks are small and the runs short; means that seeds disagree on are not counted as better."
