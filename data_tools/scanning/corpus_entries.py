"""From what a scan found out about each file to the entries of the corpus: scenes, duplicates, splits and ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from ardiff.data.corpus import OK, CorpusEntry
from data_tools.scanning.inputs import Source
from data_tools.scanning.near_duplicates import Duplicates, find_duplicates
from data_tools.scanning.scan_results import Result, Scene
from data_tools.scanning.splits import SplitItem, assign_splits

DUPLICATES = ("flag", "reject", "off")


@dataclass(frozen=True)
class EntryRules:
    """The options of scan_videos that do not concern decoding; see its --help."""

    min_frames: int
    min_scene_frames: int
    black_below: float
    folder_fps: Fraction
    duplicates: str
    class_index: dict[str, int]
    group: re.Pattern[str] | None
    split: str | None
    validation_fraction: float
    test_fraction: float


@dataclass
class _Draft:
    """An entry in the making, of video number `video`; a rejected video has one without a scene."""

    video: int
    entry: CorpusEntry
    scene: Scene | None = None


def make_entries(sources: Sequence[Source], results: Sequence[Result], rules: EntryRules) -> list[CorpusEntry]:
    """The entries of all videos, in their order; ids count them."""
    drafts = [
        draft
        for number, (source, result) in enumerate(zip(sources, results, strict=True))
        for draft in _drafts(number, source, result, rules)
    ]
    width = max(6, len(str(len(drafts))))
    for number, draft in enumerate(drafts):
        draft.entry = replace(draft.entry, id=f"{number:0{width}d}")
    usable = [draft for draft in drafts if draft.entry.ok]
    alike = _mark_duplicates(usable, rules.duplicates)
    _set_splits(usable, alike, sources, rules)
    return [draft.entry for draft in drafts]


def keep_captions(entries: Sequence[CorpusEntry], earlier: Sequence[CorpusEntry]) -> tuple[list[CorpusEntry], int]:
    """Give entries without a caption that of the same frames in an earlier corpus, wherever their file lies now.

    Returns also the number of captions there that no entry of the same video has now.
    """
    known: dict[tuple[str, int, int], list[CorpusEntry]] = {}
    for entry in earlier:
        known.setdefault(_content(entry), []).append(entry)
    kept = [
        replace(entry, caption=_nearest(entry.path, known[_content(entry)]).caption)
        if entry.caption is None and _content(entry) in known
        else entry
        for entry in entries
    ]
    present = {(video, entry.caption) for entry in kept for video in (entry.path, entry.sha256)}
    lost = sum(
        entry.caption is not None
        and (entry.path, entry.caption) not in present
        and (entry.sha256 is None or (entry.sha256, entry.caption) not in present)
        for entry in earlier
    )
    return kept, lost


def _content(entry: CorpusEntry) -> tuple[str, int, int]:
    """What entries of the same frames have in common."""
    return entry.sha256 or entry.path, entry.first_frame, entry.num_frames


def _nearest(path: str, entries: Sequence[CorpusEntry]) -> CorpusEntry:
    """Which of the entries with some content `path` was, should it have been moved: the path itself if it is there.

    Otherwise the one whose path has most of the end in common; then one with a caption; then the first.
    """

    def likeness(entry: CorpusEntry) -> tuple[bool, int, bool]:
        pairs = zip(reversed(Path(entry.path).parts), reversed(Path(path).parts), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return entry.path == path, common, entry.caption is not None

    return max(entries, key=likeness)


def _drafts(number: int, source: Source, result: Result, rules: EntryRules) -> list[_Draft]:
    """One entry per scene of a usable video, or one that says why the video is not usable."""
    entry = CorpusEntry(
        id="0",
        path=source.path,
        status=result.status,
        label=source.label,
        caption=source.caption,
        sha256=result.sha256,
        class_index=None if source.label is None else rules.class_index.get(source.label),
    )
    if not entry.ok:
        return [_Draft(number, entry)]
    fps = rules.folder_fps
    entry = replace(
        entry,
        codec=result.codec,
        width=result.width,
        height=result.height,
        fps=result.fps or f"{fps.numerator}/{fps.denominator}",
        num_frames=result.num_frames,
    )
    if result.num_frames < rules.min_frames:
        reason = f"has {result.num_frames} frames, fewer than --min_frames {rules.min_frames}"
        return [_Draft(number, replace(entry, status=reason))]
    drafts = []
    for scene in result.scenes:
        status = OK if len(result.scenes) == 1 else _scene_status(scene, rules)
        of_scene = replace(entry, status=status, first_frame=scene.first_frame, num_frames=scene.num_frames)
        drafts.append(_Draft(number, of_scene, scene))
    return drafts


def _scene_status(scene: Scene, rules: EntryRules) -> str:
    if scene.signature.brightness() < rules.black_below:
        return f"{scene.num_frames} black frames"
    for option in ("min_scene_frames", "min_frames"):
        if scene.num_frames < getattr(rules, option):
            return f"scene of {scene.num_frames} frames, fewer than --{option} {getattr(rules, option)}"
    return OK


def _mark_duplicates(drafts: Sequence[_Draft], duplicates: str) -> list[tuple[int, int]]:
    """Note the duplicates in the entries; returns pairs of videos that must share a split."""
    scenes = [draft.scene for draft in drafts if draft.scene is not None]
    for draft, scene in zip(drafts, scenes, strict=True):
        draft.entry = replace(draft.entry, perceptual_hash=scene.signature.hashes)
    if duplicates == "off":
        return []
    contents = [(draft.entry.sha256, draft.entry.first_frame, draft.entry.num_frames) for draft in drafts]
    found: Duplicates = find_duplicates([scene.signature for scene in scenes], contents)
    for draft, original in zip(drafts, found.original, strict=True):
        if original is None:
            continue
        of = drafts[original].entry
        status = f"nearly identical to {of.id} ({of.path})" if duplicates == "reject" else OK
        draft.entry = replace(draft.entry, status=status, duplicate_of=of.id)
    together = zip(found.group, drafts, strict=True)
    return [(drafts[first].video, draft.video) for first, draft in together if draft.entry.ok]


def _set_splits(
    drafts: Sequence[_Draft], alike: Sequence[tuple[int, int]], sources: Sequence[Source], rules: EntryRules
) -> None:
    """Set the splits of the entries that are ok; all scenes of a video get the same."""
    videos = sorted({draft.video for draft in drafts if draft.entry.ok})
    place = {video: number for number, video in enumerate(videos)}
    digest = {draft.video: draft.entry.sha256 or "" for draft in drafts}
    items = []
    for video in videos:
        match = rules.group.search(sources[video].path) if rules.group is not None else None
        group = None if match is None else match[1 if match.re.groups else 0]
        items.append(SplitItem(digest[video], group, sources[video].split or rules.split))
    pairs = [(place[one], place[other]) for one, other in alike]
    splits = assign_splits(items, pairs, rules.validation_fraction, rules.test_fraction)
    for draft in drafts:
        if draft.entry.ok:
            draft.entry = replace(draft.entry, split=splits[place[draft.video]])
