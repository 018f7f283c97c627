"""Where differences between claims and figures come from; shown for claims that do not hold entirely."""

FAMO_FRONT = (
    "from one start PCGrad leaves the valley late and is still on its way at the end; it is not stuck for good. The "
    "starts are those of the paper's script; its text names five, of which three are the same."
)
NASH_START = (
    "this library solves CAGrad exactly. The script minimises numerically and adds small constants, which may be what "
    "keeps it in the valley longer. In the FAMO paper, whose script takes 50 000 steps, CAGrad reaches the front from "
    "all five starts, too."
)
NASH_PLACES = "ends depend on where a path happens to meet the front."
CAGRAD_MINIMUM = "CAGrad creeps along the front, and through the valleys; more steps would tell."
CONICGRAD = (
    "on the front no direction helps both tasks. Nash-MTL's direction is zero there, so it stays where it arrives, and "
    "with equal scales only the symmetric start arrives at the minimum. The published code of Nash-MTL keeps its last "
    "weights when its solver fails, which may carry it along the front. The figure does not say which scales it uses. "
    "ConicGrad itself was not run."
)
VALLEYS = "how far it gets in the given steps depends on how it jumps between the walls."
SUPPRESSED = (
    "Adam gives each head its own step size, and the small task benefits from the trunk that the large one learns."
)
NORMALISED = "the paper does not give steps, learning rate and batches."
UNCERTAIN = (
    "the paper does not give steps, learning rate and batches; its uncertainty weights grow too large late in training."
)
PINN = "the networks are small and the runs short; a better mean does not count here if any seed disagrees."
