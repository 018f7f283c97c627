"""One model, several losses: gradient surgery and loss weighting as drop-in PyTorch optimizers."""

import sys

from gradsurgery.integrations.configuration import create, method, methods
from gradsurgery.losses import losses_by_group
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.report import Report
from gradsurgery.surgery.adatask import AdaTask
from gradsurgery.surgery.agda import AGDA
from gradsurgery.surgery.agem import AGEM
from gradsurgery.surgery.aligned_mtl import AlignedMTL
from gradsurgery.surgery.and_mask import AndMask
from gradsurgery.surgery.base import Surgery
from gradsurgery.surgery.bloop import Bloop
from gradsurgery.surgery.blur import BLUR
from gradsurgery.surgery.cagrad import CAGrad
from gradsurgery.surgery.config import ConFIG
from gradsurgery.surgery.conicgrad import ConicGrad
from gradsurgery.surgery.dbmtl import DBMTL
from gradsurgery.surgery.dcgd import DCGD
from gradsurgery.surgery.dualproj import DualProj
from gradsurgery.surgery.epo import EPO
from gradsurgery.surgery.excessmtl import ExcessMTL
from gradsurgery.surgery.fairgrad import FairGrad
from gradsurgery.surgery.ferero import FERERO
from gradsurgery.surgery.gcond import GCond
from gradsurgery.surgery.gcs import GCS
from gradsurgery.surgery.graddrop import GradDrop
from gradsurgery.surgery.gradvac import GradVac
from gradsurgery.surgery.gru import GRU
from gradsurgery.surgery.imtlg import IMTLG
from gradsurgery.surgery.krum import Krum
from gradsurgery.surgery.mconfig import MConFIG
from gradsurgery.surgery.metabalance import MetaBalance
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.moco import MoCo
from gradsurgery.surgery.modo import MoDo
from gradsurgery.surgery.mtadam import MTAdam
from gradsurgery.surgery.multiadam import MultiAdam
from gradsurgery.surgery.nash_mtl import NashMTL
from gradsurgery.surgery.pcd import PCD
from gradsurgery.surgery.pcgrad import PCGrad
from gradsurgery.surgery.pivrg import PIVRG
from gradsurgery.surgery.pmgda import PMGDA
from gradsurgery.surgery.sago import SAGO
from gradsurgery.surgery.sand_mask import SandMask
from gradsurgery.surgery.sdmgrad import SDMGrad
from gradsurgery.surgery.trimmed_mean import TrimmedMean
from gradsurgery.surgery.upgrad import UPGrad
from gradsurgery.text import suggestion
from gradsurgery.text.moved import register
from gradsurgery.watch import monitor
from gradsurgery.watch.diagnose import Diagnosis, diagnose
from gradsurgery.watch.estimate import EngineCost, Estimate, estimate
from gradsurgery.watch.monitor import Monitor
from gradsurgery.watch.samples import sample_gram, sample_norms
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.cosmos import COSMOSWeighter
from gradsurgery.weighting.cov import CoVWeighter
from gradsurgery.weighting.dwa import DWAWeighter
from gradsurgery.weighting.famo import FAMOWeighter
from gradsurgery.weighting.fixed import FixedWeighter
from gradsurgery.weighting.geometric_mean import GeometricMeanWeighter
from gradsurgery.weighting.go4align import GO4AlignWeighter
from gradsurgery.weighting.gradnorm import GradNormWeighter
from gradsurgery.weighting.group_dro import GroupDROWeighter
from gradsurgery.weighting.igb import IGBWeighter
from gradsurgery.weighting.imtl_l import IMTLLWeighter
from gradsurgery.weighting.ldc_mtl import LDCMTLWeighter
from gradsurgery.weighting.loss_size import (
    InitialLossWeighter,
    PriorLossWeighter,
    RealTimeWeighter,
    label_entropy,
    label_variance,
    uniform_prior,
)
from gradsurgery.weighting.lr_annealing import LRAnnealingWeighter
from gradsurgery.weighting.normalized_gradient import NormalizedGradientWeighter
from gradsurgery.weighting.ntk import NTKWeighter
from gradsurgery.weighting.pbi import PBIWeighter
from gradsurgery.weighting.relobralo import ReLoBRaLoWeighter
from gradsurgery.weighting.rlw import RandomWeighter
from gradsurgery.weighting.running_max import RunningMaxWeighter
from gradsurgery.weighting.slaw import SLAWWeighter
from gradsurgery.weighting.softadapt import (
    LossWeightedSoftAdaptWeighter,
    NormalizedSoftAdaptWeighter,
    SoftAdaptWeighter,
)
from gradsurgery.weighting.stch import STCHWeighter
from gradsurgery.weighting.uncertainty import UncertaintyWeighter
from gradsurgery.weighting.uwso import UWSOWeighter

__version__ = "0.1.0"


# Old names are registered and not kept as files: to import a file called diagnose would hide the function.
sys.modules["gradsurgery.monitor"] = monitor
register(
    {
        "gradsurgery.call": {
            "Call": "gradsurgery.batch:Batch",
            "parameters": "gradsurgery.batch:parameters",
            "require_reached": "gradsurgery.batch:require_reached",
            "representation": "gradsurgery.batch:representation",
        },
        "gradsurgery.catalogue": {
            name: f"gradsurgery.cli.catalogue:{name}"
            for name in ("Entry", "Facts", "built", "entries", "facts", "find")
        },
        "gradsurgery.diagnose": {
            name: f"gradsurgery.watch.diagnose:{name}" for name in ("Cost", "Diagnosis", "Pair", "diagnose")
        },
        "gradsurgery.estimate": {
            name: f"gradsurgery.watch.estimate:{name}" for name in ("EngineCost", "Estimate", "estimate")
        },
        "gradsurgery.kept": {"Kept": "gradsurgery.gradients.accumulated:Accumulated"},
        "gradsurgery.world": {"World": "gradsurgery.communication:Processes"},
    },
    removed_in="1.0",
)


def __getattr__(name: str) -> object:
    hint = "" if name.startswith("_") else suggestion(name, __all__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


__all__ = [
    "AGDA",
    "AGEM",
    "BLUR",
    "DBMTL",
    "DCGD",
    "EPO",
    "FERERO",
    "GCS",
    "GRU",
    "IMTLG",
    "MGDA",
    "PCD",
    "PIVRG",
    "PMGDA",
    "SAGO",
    "AdaTask",
    "AlignedMTL",
    "AndMask",
    "Bloop",
    "CAGrad",
    "COSMOSWeighter",
    "CoVWeighter",
    "ConFIG",
    "ConicGrad",
    "DWAWeighter",
    "Diagnosis",
    "DualProj",
    "EngineCost",
    "Estimate",
    "ExcessMTL",
    "FAMOWeighter",
    "FairGrad",
    "FixedWeighter",
    "GCond",
    "GO4AlignWeighter",
    "GeometricMeanWeighter",
    "GradDrop",
    "GradNormWeighter",
    "GradVac",
    "GroupDROWeighter",
    "IGBWeighter",
    "IMTLLWeighter",
    "InitialLossWeighter",
    "Krum",
    "LDCMTLWeighter",
    "LRAnnealingWeighter",
    "LossWeightedSoftAdaptWeighter",
    "MConFIG",
    "MTAdam",
    "MetaBalance",
    "MoCo",
    "MoDo",
    "Monitor",
    "MultiAdam",
    "MultiLossOptimizer",
    "NTKWeighter",
    "NashMTL",
    "NormalizedGradientWeighter",
    "NormalizedSoftAdaptWeighter",
    "PBIWeighter",
    "PCGrad",
    "PriorLossWeighter",
    "RandomWeighter",
    "ReLoBRaLoWeighter",
    "RealTimeWeighter",
    "Report",
    "RunningMaxWeighter",
    "SDMGrad",
    "SLAWWeighter",
    "STCHWeighter",
    "SandMask",
    "SoftAdaptWeighter",
    "Surgery",
    "TrimmedMean",
    "UPGrad",
    "UWSOWeighter",
    "UncertaintyWeighter",
    "Weighter",
    "create",
    "diagnose",
    "estimate",
    "label_entropy",
    "label_variance",
    "losses_by_group",
    "method",
    "methods",
    "sample_gram",
    "sample_norms",
    "uniform_prior",
]
