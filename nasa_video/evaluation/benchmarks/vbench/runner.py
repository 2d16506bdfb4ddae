"""Runs inside VBench's own environment: reads one request, scores its videos, and writes a JSON line for each score.

It imports nothing of nasa_video and is started by path. The request is one JSON object on standard input:

    {"mode": "standard" | "long", "device": "cpu", "work": FOLDER,
     "dimensions": ["temporal_flickering", …],
     "videos": [{"key": "…", "path": FILE.mp4, "prompt": "…", "dimensions": [all of the prompt's own],
                 "auxiliary": {…} | null}, …]}

The answer is JSON lines on standard output; whatever VBench prints goes to standard error:

    {"kind": "versions", "vbench": "0.1.5", "torch": "…", …}
    {"kind": "score", "dimension": D, "key": K, "score": x, "clips": n}      0..1; null where VBench gave none
    {"kind": "failed", "dimension": D, "reason": "…"}
    {"kind": "end"}

Facts about VBench that this depends on are in docs/guides/evaluation.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Seconds of a clip in VBench-Long by dimension; the file that says so is not in its wheel.
LONG_CLIPS = ("human_action", "temporal_style", "overall_consistency")
LONG_CLIP_SECONDS, CLIP_SECONDS = 10.0, 2.0
# Their own Long variants compare clips with each other by a further model, at weight 0 by default: only the score
# inside the clips counts, and that is what the standard function gives on the clips.
SCORED_BY_CLIP = ("subject_consistency", "background_consistency")
PERCENT = ("imaging_quality",)
DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip


def main() -> int:
    """Answer the request on standard input."""
    answer = _take_over_stdout()
    request = json.load(sys.stdin)

    def tell(entry: dict[str, Any]) -> None:
        answer.write(json.dumps(entry) + "\n")
        answer.flush()

    tell({"kind": "versions", **versions()})
    run(request, tell)
    tell({"kind": "end"})
    return 0


def run(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Score every dimension by itself: one that fails takes no other along."""
    work = Path(request["work"])
    folder = work / "videos"
    names = _lay_out(request["videos"], folder)
    score = _score_long if request["mode"] == "long" else _score_standard
    for dimension in request["dimensions"]:
        try:
            found = score(dimension, request, names, work)
        except Exception as error:
            traceback.print_exc()
            tell({"kind": "failed", "dimension": dimension, "reason": f"{type(error).__name__}: {error}"[:500]})
            continue
        for name, video in names.items():
            values = found.get(name, [])
            mean = sum(values) / len(values) if values else None
            tell({"kind": "score", "dimension": dimension, "key": video["key"], "score": mean, "clips": len(values)})


def versions() -> dict[str, str]:
    """Versions of what scores depend on."""
    found = {}
    for name in ("vbench", "torch", "torchvision", "transformers", "numpy", "pyiqa", "av", "opencv-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def regroup(rows: list[dict[str, Any]], dimension: str) -> dict[str, list[float]]:
    """VBench's rows of videos or clips as values by the video's name, 0..1."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "video_path" in row:
            value = float(row["video_results"])
            grouped[video_of(row["video_path"])].append(value / 100 if dimension in PERCENT else value)
    return dict(grouped)


def video_of(path: str) -> str:
    """The name of the video that a video's or clip's file belongs to: ``a cat-0_003.mp4`` is of ``a cat-0``."""
    return re.sub(r"_(\d+|full)$", "", Path(path).stem)


def _lay_out(videos: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Link the videos as ``prompt-N.mp4`` into a fresh folder; returns the videos by that name.

    The names matter: human_action reads the action from them, and VBench-Long the prompt. An underscore would end the
    name there, so it becomes a space.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = defaultdict(int)
    for video in videos:
        prompt = re.sub(r"[_/\\\0]", " ", video["prompt"])[:200]
        name = f"{prompt}-{count[prompt]}"
        count[prompt] += 1
        _link(Path(video["path"]), folder / f"{name}.mp4")
        names[name] = video
    return names


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _prompt_entries(
    names: dict[str, dict[str, Any]], dimension: str, files: Callable[[str], list[str]]
) -> list[dict[str, Any]]:
    """What VBench calls the full info: prompts, their dimensions, and the files that show them."""
    entries: dict[str, dict[str, Any]] = {}
    for name, video in names.items():
        prompt = name.rpartition("-")[0]
        entry = entries.setdefault(
            prompt,
            {"prompt_en": prompt, "dimension": sorted({*video["dimensions"], dimension}), "video_list": []},
        )
        entry["video_list"] += files(name)
        if video.get("auxiliary"):
            entry["auxiliary_info"] = video["auxiliary"]
    return list(entries.values())


def _with_info(base: Any, info: Path) -> Any:
    """VBench's class with our list of videos in place of its search by name, which takes five samples at most."""

    class WithInfo(base):  # type: ignore[misc]
        def build_full_info_json(self, *_: Any, **__: Any) -> str:
            return str(info)

    return WithInfo


def _evaluate(base: Any, dimension: str, request: dict[str, Any], info: Path, work: Path, **options: Any) -> Any:
    torch = importlib.import_module("torch")
    results = work / f"results-{dimension}"
    bench = _with_info(base, info)(torch.device(request["device"]), str(info), str(results))
    # local: weights come from VBENCH_CACHE_DIR; whoever started this has seen that they are there.
    bench.evaluate(str(work / "videos"), "ours", dimension_list=[dimension], local=True, read_frame=False, **options)
    return json.loads((results / "ours_eval_results.json").read_text())[dimension]


def _score_standard(
    dimension: str, request: dict[str, Any], names: dict[str, dict[str, Any]], work: Path
) -> dict[str, list[float]]:
    open_torchvision()
    vbench = importlib.import_module("vbench")
    folder = work / "videos"
    entries = _prompt_entries(names, dimension, lambda name: [str(folder / f"{name}.mp4")])
    info = _write(work / f"info-{dimension}.json", entries)
    result = _evaluate(vbench.VBench, dimension, request, info, work, mode="vbench_standard")
    return regroup(result[1], dimension)


def _score_long(
    dimension: str, request: dict[str, Any], names: dict[str, dict[str, Any]], work: Path
) -> dict[str, list[float]]:
    open_torchvision()
    _give_write_video()
    long = importlib.import_module("vbench2_beta_long")
    folder, clips = work / "videos", work / "videos" / "split_clip"
    lengths = {d: LONG_CLIP_SECONDS if d in LONG_CLIPS else CLIP_SECONDS for d in DIMENSIONS}
    options = {
        "mode": "long_vbench_standard",
        "use_semantic_splitting": False,
        "clip_length_config": str(_write(work / "clip_lengths.json", lengths)),  # JSON is YAML
        "static_filter_flag": False,
        "dev_flag": False,
    }
    if not clips.exists():
        # The folder is fresh, so what is in it was cut from these very videos, for another dimension of this request.
        every = _write(work / "prompts.json", _prompt_entries(names, dimension, lambda name: []))
        splitter = long.VBenchLong("cpu", str(every), str(work))
        splitter.preprocess(str(folder), **options)
    entries = _prompt_entries(names, dimension, lambda name: sorted(map(str, (clips / name).glob("*.mp4"))))
    info = _write(work / f"info-{dimension}.json", entries)
    if dimension in SCORED_BY_CLIP:
        vbench = importlib.import_module("vbench")
        result = _evaluate(vbench.VBench, dimension, request, info, work, mode="vbench_standard")
    else:
        result = _evaluate(long.VBenchLong, dimension, request, info, work, **options)
    return regroup(result[1], dimension)


def open_torchvision() -> None:
    """Import torchvision, also one that was built for CUDA beside a CPU build of torch.

    There its own operators are missing, and its import stops at describing them. Declared without an implementation
    they let the import pass; only dimensions that call them (GRiT's boxes) fail then, and say so.
    """
    torch = importlib.import_module("torch")
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(declared)
    importlib.import_module("torchvision")


_kept: list[Any] = []
"""What must not be collected: operators vanish with their library."""


def _give_write_video() -> None:
    """VBench-Long writes its clips by a function that newer torchvision no longer has: H.264, yuv420p, by PyAV."""
    io: Any = importlib.import_module("torchvision.io")
    if hasattr(io, "write_video"):
        return
    av = importlib.import_module("av")
    torch = importlib.import_module("torch")

    def write_video(filename: str, video_array: Any, fps: float, **_: Any) -> None:
        pictures = torch.as_tensor(video_array, dtype=torch.uint8).numpy()
        with av.open(filename, mode="w") as container:
            stream = container.add_stream("libx264", rate=round(fps))
            stream.height, stream.width = pictures.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    io.write_video = write_video


def _write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _take_over_stdout() -> Any:
    """Keep standard output for the answer; what libraries print, in C too, goes to standard error."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answer


def read_answer(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The entries of an answer; lines that are none are left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "kind" in entry:
            yield entry


if __name__ == "__main__":
    sys.exit(main())
