"""Join neighbouring members of one key into samples, by WebDataset's rule, so that nothing vanishes.

Every occurrence of a key is a sample: one that can be tokenized, or one that carries the reason why not."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from pipeline.media import media_kind_of_extension, sniff_media
from pipeline.sample import Member, Sample
from schemas.errors import (
    AmbiguousMedia,
    ArchiveError,
    KeyDuplicated,
    KeySplit,
    MemberTooLarge,
    NoMedia,
    SampleCutOff,
    SampleError,
    TooManyMembers,
)
from schemas.jobspec import LimitsSpec

MAX_MEMBERS = 256
"""Of one sample.  With the limit on sidecars it bounds what one key can hold in memory."""

_MAX_NAME_CHARS = 64
"""Of a key or extension that is remembered as it is."""
_META = re.compile(r"__[^/]*__(?:$|/)")
_kind_of_extension = lru_cache(maxsize=1024)(media_kind_of_extension)


@dataclass(slots=True)
class GroupCounts:
    """What grouping has met so far."""

    num_samples: int = 0
    """Occurrences of keys, failed ones too."""
    num_passed_over: int = 0
    """Members that belong to no sample: dot files, __MACOSX/, names without an extension."""


@dataclass(slots=True)
class _Run:
    """Neighbouring members of one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    extensions: list[str | bytes] = field(default_factory=list)
    """In lower case, in order, as they are remembered."""
    repeated: str | None = None
    """Name of the first member whose extension was there already."""
    media: list[Member] = field(default_factory=list)
    num_members: int = 0

    def add(self, extension: str, member: Member) -> None:
        self.num_members += 1
        lower = extension.lower()
        if self.num_members > MAX_MEMBERS:
            return
        remembered = _short(lower)
        if remembered in self.extensions:
            self.repeated = self.repeated or member.name
        if member.kind == "file" and _kind_of_extension(lower[-_MAX_NAME_CHARS:]) is not None:
            self.media.append(member)
            if len(self.media) > 1:
                # The sample fails whatever comes; a hundred films under one key must not fill the memory.
                member.payload = None
        self.extensions.append(remembered)
        self.members.setdefault(extension, member)


def _short(name: str) -> str | bytes:
    """Return what a key or extension is remembered by, a hash for long ones: a hostile archive can make millions."""
    return name if len(name) <= _MAX_NAME_CHARS else hashlib.blake2b(name.encode(), digest_size=16).digest()


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension of a member: folder and base name up to its first dot, and what follows that dot.

    None for what belongs to no sample: names without extension, dot files, and what macOS and WebDataset keep under
    names of their own.  The case of the extension is kept.  The key may hold dots in its folders."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or (name.startswith("__") and _META.match(name)):
        return None
    if "__MACOSX" in folder and "__MACOSX" in folder.split("/"):
        return None
    return folder + slash + stem, extension


def group_samples(
    members: Iterable[Member], limits: LimitsSpec | None = None, *, counts: GroupCounts | None = None
) -> Iterator[Sample]:
    """Yield the samples of an archive in order; each has either its media member or a failure.

    `limits` are those that `members` was read with, for messages.  An ArchiveError is passed on after the samples
    before the damage and, where a sample was being read, one that failed with SampleCutOff."""
    grouper = _Grouper(limits or LimitsSpec(), counts or GroupCounts())
    run: _Run | None = None
    try:
        for member in members:
            parts = split_name(member.name)
            if parts is None:
                grouper.counts.num_passed_over += 1
                continue
            key, extension = parts
            if run is None or run.key != key:
                if run is not None:
                    yield grouper.finish(run)
                run = _Run(key)
            run.add(extension, member)
    except ArchiveError as error:
        yield from grouper.finish_damaged(run, error)
        raise
    if run is not None:
        yield grouper.finish(run)


class _Grouper:
    def __init__(self, limits: LimitsSpec, counts: GroupCounts) -> None:
        self.counts = counts
        self._limits = limits
        self._seen: dict[str | bytes, frozenset[str | bytes]] = {}
        self._same_extensions: dict[frozenset[str | bytes], frozenset[str | bytes]] = {}
        self._usual_extensions: set[str | bytes] = set()

    def finish(self, run: _Run) -> Sample:
        failure = self._occurrence_failure(run) or self._member_failure(run) or self._media_failure(run)
        media = run.media[0] if failure is None else None
        if media is not None:
            self._usual_extensions.update(run.extensions)
        return self._sample(run, media, failure)

    def finish_damaged(self, run: _Run | None, error: ArchiveError) -> Iterator[Sample]:
        """Yield what can still be said where the archive breaks off."""
        parts = split_name(error.member) if error.member is not None else None
        torn_key = parts[0] if parts else None
        if run is not None and run.key != torn_key:
            # Complete is what another key or the end of the archive follows.  Where the damage hides what follows, a
            # sample with every extension that samples of this shard have is taken as whole, any other is not.
            followed = error.sure and (torn_key is not None or error.member is None)
            usual = bool(self._usual_extensions) and self._usual_extensions.issubset(run.extensions)
            if followed or usual:
                yield self.finish(run)
            else:
                yield self._sample(run, None, _cut_off(error))
        if torn_key is not None:
            torn = run if run is not None and run.key == torn_key else _Run(torn_key)
            yield self._sample(torn, None, _cut_off(error))

    def _sample(self, run: _Run, media: Member | None, failure: SampleError | None) -> Sample:
        position = self.counts.num_samples
        self.counts.num_samples += 1
        return Sample(position, run.key, run.members, media, failure)

    def _occurrence_failure(self, run: _Run) -> SampleError | None:
        key = _short(run.key)
        extensions = frozenset(run.extensions)
        before = self._seen.get(key)
        if before is None:
            self._seen[key] = self._same_extensions.setdefault(extensions, extensions)
            return None
        again = [extension for extension in run.members if _short(extension.lower()) in before]
        is_full = len(before) >= MAX_MEMBERS  # so many are no members of one sample
        if not is_full:
            self._seen[key] = before | extensions
        if again or is_full:
            return KeyDuplicated(
                f"Key {run.key!r} was complete before and comes again with {_listed(again or run.members)}; its first "
                "occurrence is tokenized. Give every sample of a shard a key of its own."
            )
        return KeySplit(
            f"Key {run.key!r} came before, and other keys stand between its members; its first occurrence is tokenized "
            f"without {_listed(run.members)}. Write the members of a sample one after the other."
        )

    def _member_failure(self, run: _Run) -> SampleError | None:
        if run.num_members > MAX_MEMBERS:
            return TooManyMembers(
                f"Key {run.key!r} has {run.num_members:,} members; at most {MAX_MEMBERS} are taken. "
                "Check how keys are made: what follows the first dot of a name is the extension."
            )
        if len(run.media) > 1:
            names = ", ".join(repr(member.name) for member in run.media[:4])
            return AmbiguousMedia(
                f"Key {run.key!r} has {len(run.media)} image or video members ({names}); a sample has one. "
                "Give each a key of its own.",
                member=run.media[1].name,
            )
        if run.repeated is not None:
            return KeyDuplicated(
                f"Key {run.key!r} has two members with the extension of {run.repeated!r}. "
                "Give every sample of a shard a key of its own.",
                member=run.repeated,
            )
        return None

    def _media_failure(self, run: _Run) -> SampleError | None:
        if run.media:
            media = run.media[0]
            if media.payload is not None:
                return None
            return MemberTooLarge(
                f"Member {media.name!r} has {media.size:,} bytes, over the limit of {self._limits.max_member_bytes:,}. "
                "Raise limits.max_member_bytes to take it.",
                member=media.name,
            )
        return _no_media(run)


def _no_media(run: _Run) -> NoMedia:
    for member in run.members.values():
        if member.kind != "file":
            what = {"link": "a link", "device": "a device or special file", "sparse": "a sparse file"}[member.kind]
            return NoMedia(
                f"Member {member.name!r} of key {run.key!r} is {what}, which is never read, and there is no other "
                "image or video. Write plain files (`tar --dereference --hard-dereference`).",
                member=member.name,
            )
        if member.payload and (kind := sniff_media(member.payload)):
            # Not taken for the sample's media: an extension that nobody knows is more often a mistake than a picture.
            return NoMedia(
                f"Key {run.key!r} has no member with an image or video extension, though {member.name!r} has the "
                f"content of {'an image' if kind == 'image' else 'a video'}. Rename it to take it.",
                member=member.name,
            )
    return NoMedia(
        f"Key {run.key!r} has no image or video member, only {_listed(run.members)}. Check how the shard was made."
    )


def _listed(extensions: Collection[str]) -> str:
    names = [f".{extension}" for extension in itertools.islice(extensions, 8)]
    return ", ".join(names) + (", …" if len(extensions) > 8 else "")


def _cut_off(error: ArchiveError) -> SampleCutOff:
    return SampleCutOff(
        f"The archive is damaged at byte {error.offset:,} ({error.error}) where this sample was read, and members of "
        "it may be lost. Mend the shard and retry it.",
        member=error.member,
    )
