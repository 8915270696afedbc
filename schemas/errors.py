"""The error family.  Each class knows what it stops and, where it ends a command, the exit code.

BsqError                      ends the command; one line for people
├── SpecError                 2   bad usage, option or job spec
├── CheckpointError           2   tokenizer weights that cannot be used
├── StreamError               2   a .bsq file that cannot be decoded
├── Refused                   4   the output cannot be used: LeaseHeld, FingerprintDiffers, OutputNotOurs
│   └── OutputError           4   storage refuses to take the output: OutputNotWritable, OutputFull
├── LeaseLost                 4   another driver has taken the job over
├── CircuitBreakerOpen        3   too much fails to go on
├── Interrupted               130 stopped by a signal; resumable
└── InputError                    never ends a job: becomes a failure row or a shard attempt
    ├── ShardError                the whole shard: ShardNotFound, ShardForbidden, ShardUnreadable, NotATar,
    │                             SourceChanged, ShardDiffers
    ├── ArchiveError              the rest of an archive: TarTruncated, TarCorrupt, GzipCorrupt
    └── SampleError               one sample, one subclass for each class of the failure table

Standard library only: the tokenizer raises these where neither pydantic nor pyarrow is installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class BsqError(Exception):
    """Something a person can act on; `str(error)` is one or two lines without a traceback."""

    exit_code: ClassVar[int] = 1


class SpecError(BsqError):
    """An option, a job spec or a call that cannot mean anything."""

    exit_code = 2


class CheckpointError(BsqError):
    """Tokenizer weights that are missing, damaged, hostile, or of another architecture."""

    exit_code = 2


class StreamError(BsqError):
    """A .bsq file that is damaged, too large, or made with other weights or other arithmetic."""

    exit_code = 2


class Refused(BsqError):
    """The output exists and must not be written by this job."""

    exit_code = 4


class LeaseHeld(Refused):
    """Another driver that may be alive holds the output."""


class FingerprintDiffers(Refused):
    """The output was made with other settings; the message names the fields that differ."""


class OutputNotOurs(Refused):
    """The output folder holds something that is not a bsqtok dataset."""


class OutputError(Refused):
    """The storage of the output failed; the job stops at once, nothing is half-written."""

    stage: ClassVar[str] = "write"


class OutputNotWritable(OutputError):
    """The output cannot be created or written."""


class OutputFull(OutputError):
    """No space is left, or a file-size limit or quota is reached."""


class ArithmeticDiffers(Refused):
    """A worker computes in another arithmetic than made the tokens that are there, and a mix is not allowed."""


class LeaseLost(BsqError):
    """Another driver took the job over while this one was running (or asleep)."""

    exit_code = 4


class CircuitBreakerOpen(BsqError):
    """So many shards or samples fail that going on would only burn through the rest."""

    exit_code = 3


class Interrupted(BsqError):
    """A signal asked the job to stop; committed work is kept."""

    exit_code = 130


class InputError(BsqError):
    """Bad input.  `stage` and the class name are what the failure table and the ledger record."""

    stage: ClassVar[str] = "read"

    @property
    def error(self) -> str:
        """The class as recorded in the failure table."""
        return type(self).__name__


class ShardError(InputError):
    """The whole shard cannot be tokenized in this attempt."""

    retryable: ClassVar[bool] = True


class ShardNotFound(ShardError):
    """Storage says that there is no such object."""

    stage = "open"
    retryable = False


class ShardForbidden(ShardError):
    """Storage refuses to let us read the object."""

    stage = "open"
    retryable = False


class ShardUnreadable(ShardError):
    """Storage keeps failing."""

    stage = "open"


class NotATar(ShardError):
    """The object is no tar archive at all."""

    retryable = False


class SourceChanged(ShardError):
    """Size or etag of the object changed while it was read: somebody still writes it, and rows of two must not mix."""

    retryable = False


class ShardDiffers(ShardError):
    """A retry met other samples than those that the shard had when it was tokenized."""

    stage = "group"
    retryable = False


class ArchiveError(InputError):
    """The archive is damaged from byte `offset` on; samples before it are good.

    `member` was being read then.  `sure` says that what follows the last whole member is known: `member`, or (None) the
    proper end of the archive.  When it is not, `member` is the best guess, and the last sample may have had more."""

    def __init__(self, message: str, *, offset: int, member: str | None = None, sure: bool = False) -> None:
        super().__init__(message)
        self.offset = offset
        self.member = member
        self.sure = sure


class TarTruncated(ArchiveError):
    """The archive ends before its closing blocks."""


class TarCorrupt(ArchiveError):
    """A header or its checksum is wrong."""


class GzipCorrupt(ArchiveError):
    """The compressed stream is damaged or ends early."""


class SampleError(InputError):
    """One sample (or, with severity "warning", one carried member) is bad."""

    severity: ClassVar[str] = "failed"

    def __init__(self, message: str, *, member: str | None = None, clip: int | None = None) -> None:
        super().__init__(message)
        self.member = member
        self.clip = clip


class SampleCutOff(SampleError):
    """The archive is damaged inside or right after the sample, so that members of it may be lost."""


class GroupError(SampleError):
    """The members of a key do not make a sample."""

    stage = "group"


class KeyDuplicated(GroupError):
    """The key was complete before and comes again in the same shard."""


class KeySplit(GroupError):
    """Members of the key are interleaved with those of another."""


class NoMedia(GroupError):
    """No image or video member."""


class AmbiguousMedia(GroupError):
    """More than one image or video member."""


class MemberTooLarge(GroupError):
    """The media member is over the byte limit; it was passed over without being read into memory."""


class TooManyMembers(GroupError):
    """More members under one key than a sample has; those beyond the limit were dropped."""


class DecodeError(SampleError):
    """The media member cannot be decoded."""

    stage = "decode"


class MediaTruncated(DecodeError):
    """The media ends early."""


class MediaCorrupt(DecodeError):
    """The media is damaged inside."""


class MediaUnsupported(DecodeError):
    """No supported format, codec or variant."""


class NoFrames(DecodeError):
    """The container opens but yields no frame."""


class DecodeTimeout(DecodeError):
    """Decoding took longer than the limit for one sample."""


class WorkerCrash(DecodeError):
    """Decoding this sample kills the process that does it."""


class LimitError(SampleError):
    """Over or under a limit of the job spec."""

    stage = "limit"


class ImageTooLarge(LimitError):
    """More pixels than allowed, by the header."""


class ImageTooSmall(LimitError):
    """A side shorter than allowed."""


class VideoTooLong(LimitError):
    """More frames or seconds than allowed."""


class SidecarWarning(SampleError):
    """A carried member is bad: the sample is tokenized, the column is null."""

    stage = "sidecar"
    severity = "warning"


class CaptionNotText(SidecarWarning):
    """The caption is not UTF-8 text, or too long."""


class LabelNotInteger(SidecarWarning):
    """The label is no integer of 64 bits."""


class MetadataNotJSON(SidecarWarning):
    """The metadata is no strict JSON."""


class FrameTimesMissing(SampleError):
    """Frame times are missing or run backwards and were made up from the frame rate."""

    stage = "decode"
    severity = "warning"


class MediaTruncatedKept(SampleError):
    """A truncated picture was kept as a lenient decoder gives it (`truncated: keep`)."""

    stage = "decode"
    severity = "warning"


class EncodeError(SampleError):
    """The encoder's output for this sample cannot be used."""

    stage = "encode"


class NonFiniteLatents(EncodeError):
    """NaN or infinity came out of the encoder."""


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `names`, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def printable(value: str | bytes) -> str:
    """Return `value` as valid UTF-8 text; bytes that are not (and lone surrogates) become `\\xNN`."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return raw.decode("utf-8", "backslashreplace")
