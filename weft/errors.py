"""Every error weft raises on purpose.

    WeftError
    ├── InputError              what the user gave is wrong: one line, exit code 2, nothing written
    │   ├── TargetError         TARGET is missing, has no workload, or raised
    │   ├── PlanError           degrees, plan file, schedule
    │   ├── ClusterError        cluster file or preset
    │   ├── BatchError          a batch that cannot be divided
    │   ├── LossError           a loss that is neither a scalar nor (sum, count)
    │   ├── ModelError          the model cannot be run on fake tensors, or cannot be divided as asked
    │   ├── MemoryLimitError    nothing fits in the memory given
    │   ├── CheckpointError     a checkpoint that is missing, broken or another model's
    │   └── DisagreementError   ranks of one job were given different plans, models or batches
    └── JobError                the work itself failed: exit code 1
        ├── WorkerError         a process of the job died (rank, stage, cause)
        │   └── StuckError      ranks waited for it too long (host, step, action, tensor)
        ├── GaveUpError         a job died too often, or at the same step twice in a row (the report)
        ├── SaveError           a checkpoint could not be written
        ├── NonFiniteError      a step's loss or gradient is NaN or infinite (step, unit, what)
        └── ReplicaError        ranks that hold the same weights do not (step, name, ranks)

Each message says what we got, what we expected and what to type instead.
"""

import errno


class WeftError(Exception):
    """Base of all errors weft raises on purpose."""

    exit_code = 1


class InputError(WeftError):
    """What the user gave is wrong; the message names the remedy."""

    exit_code = 2


class TargetError(InputError):
    """A TARGET that is missing, has no workload, or raises."""


class PlanError(InputError):
    """A plan, or a degree asked for, that cannot be."""


class ClusterError(InputError):
    """A cluster file or preset that cannot be read."""


class BatchError(InputError):
    """A batch that cannot be divided."""


class LossError(InputError):
    """A loss that is neither a scalar nor ``(sum, count)``."""


class ModelError(InputError):
    """A model that cannot be captured, or cannot be divided as asked."""


class MemoryLimitError(InputError):
    """Nothing fits in the memory given; the message says the least that would do."""


class CheckpointError(InputError):
    """A checkpoint that is missing, broken, or of another model."""


class DisagreementError(InputError):
    """Ranks of one job that were given different plans, models or batches."""


class JobError(WeftError):
    """The work itself failed."""


class GaveUpError(JobError):
    """A job that died too often, or at the same step twice in a row. The message is the report.

    Attributes:
        traceback: of the last death, as ``WorkerError``'s.
    """

    def __init__(self, message: str, *, traceback: str = "") -> None:
        self.traceback = traceback
        super().__init__(message)


class SaveError(JobError):
    """A checkpoint that could not be written; those before it are as they were."""


class NonFiniteError(JobError):
    """A step whose loss or gradients are not finite; it has changed nothing.

    Attributes:
        step: counted from 1.
        unit: where the first such number appeared.
        what: what happened there, in words.
    """

    def __init__(self, message: str, *, step: int = 0, unit: str = "", what: str = "") -> None:
        self.step, self.unit, self.what = step, unit, what
        super().__init__(message)


class ReplicaError(JobError):
    """Copies of one tensor that are no longer equal.

    Attributes:
        step: steps done.
        name: the first tensor of the model that differs, by its single-device name.
        ranks: those that hold it, in lists of equal copies, the longest first.
    """

    def __init__(self, message: str, *, step: int = 0, name: str = "", ranks: tuple[tuple[int, ...], ...] = ()) -> None:
        self.step, self.name, self.ranks = step, name, ranks
        super().__init__(message)


class WorkerError(JobError):
    """A process of the job died.

    Attributes:
        rank: global rank of the first process that failed.
        stage: its pipeline stage, or None where there was no plan yet.
        cause: what it died of, in one line.
        traceback: where, as Python prints it; empty where the process left none (a signal).
    """

    def __init__(self, *, rank: int, stage: int | None, cause: str, traceback: str = "") -> None:
        self.rank, self.stage, self.cause, self.traceback = rank, stage, cause, traceback
        where = f"rank {rank}" if stage is None else f"rank {rank} (stage {stage})"
        super().__init__(f"{where} failed: {cause}")


class StuckError(WorkerError):
    """Ranks waited for a process of the job longer than they may.

    Attributes:
        host: where it runs.
        step: the step it was doing, counted from 0; None before the first, or where that is not known.
        action: what it was doing, in words.
        tensor: what was waited for, where it was one tensor of another stage.
    """

    def __init__(
        self,
        *,
        rank: int,
        stage: int | None,
        cause: str,
        host: str,
        step: int | None,
        action: str,
        tensor: str | None,
        traceback: str = "",
    ) -> None:
        super().__init__(rank=rank, stage=stage, cause=cause, traceback=traceback)
        self.host, self.step, self.action, self.tensor = host, step, action, tensor
        where = f"rank {rank}" if stage is None else f"rank {rank} (stage {stage})"
        self.args = (f"{where} on {host} is stuck: {cause}",)


def of_name(error: OSError) -> bool:
    """Whether it is the name of a file that is wrong, and not the disk."""
    wrong = (
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES,
        errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTEMPTY, errno.EXDEV,
    )  # fmt: skip
    return error.errno in wrong
