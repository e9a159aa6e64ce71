"""The planted faults: what a tired programmer, a wrong merge or a clever optimisation could do to this code."""

from __future__ import annotations

from harness import Fault

from mutant.baseline import BASELINE_FAULTS
from mutant.booster_math import BOOSTER_MATH_FAULTS
from mutant.boosting import BOOSTING_FAULTS
from mutant.data import BATCH_FAULTS, ROW_FAULTS
from mutant.factor_file import FACTOR_FILE_FAULTS
from mutant.file import FILE_FAULTS, HUB_FAULTS
from mutant.hidden import BESIDE_FAULTS, EDIT_FAULTS, ENTRY_FAULTS
from mutant.low_rank import LOW_RANK_FAULTS
from mutant.method import KERNEL_FAULTS, LAYER_FAULTS, PACKED_FAULTS, REFERENCE_FAULTS
from mutant.multi_task import TASK_FAULTS
from mutant.selection import CALIBRATION_FAULTS, CHOICE_FAULTS
from mutant.shared_factor import SHARED_FACTOR_FAULTS
from mutant.structure import CONVOLUTION_FAULTS, EXPERT_FAULTS, STRUCTURE_FAULTS
from mutant.training import PROCESS_FAULTS, RESUME_FAULTS, RUN_FAULTS, TRAINING_FAULTS

FAULTS: tuple[Fault, ...] = (
    *KERNEL_FAULTS,
    *LAYER_FAULTS,
    *PACKED_FAULTS,
    *REFERENCE_FAULTS,
    *ENTRY_FAULTS,
    *EDIT_FAULTS,
    *BESIDE_FAULTS,
    *STRUCTURE_FAULTS,
    *EXPERT_FAULTS,
    *CONVOLUTION_FAULTS,
    *CHOICE_FAULTS,
    *CALIBRATION_FAULTS,
    *BOOSTING_FAULTS,
    *BOOSTER_MATH_FAULTS,
    *TRAINING_FAULTS,
    *RESUME_FAULTS,
    *PROCESS_FAULTS,
    *RUN_FAULTS,
    *ROW_FAULTS,
    *BATCH_FAULTS,
    *LOW_RANK_FAULTS,
    *SHARED_FACTOR_FAULTS,
    *FACTOR_FILE_FAULTS,
    *FILE_FAULTS,
    *HUB_FAULTS,
    *BASELINE_FAULTS,
    *TASK_FAULTS,
)
