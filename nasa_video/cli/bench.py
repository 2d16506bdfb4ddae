"""``nasa-video bench``: what a chunk costs under each method."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nasa_video.cli.console import console, emit_json, shown_warnings
from nasa_video.errors import format_bytes


def bench(
    model: Annotated[str, typer.Option(help="Preset, folder, or hub id.")] = "causvid",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A model of the preset's sizes without its weights.")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Run only that many layers; all by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    chunks: Annotated[int, typer.Option(help="Chunks of each video.")] = 2,
    repeats: Annotated[int, typer.Option(help="Videos of each method.")] = 5,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on CUDA, else float32")
    ] = None,
    attention: Annotated[str, typer.Option(help="Kernel of the text attention: sdpa or xformers.")] = "sdpa",
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the transformer.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Time the VAE's decoding as well.")] = False,
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods: none,cfg:2,nasa,nasa-padded.", show_default="all")
    ] = None,
    positive_tokens: Annotated[int, typer.Option(help="Real tokens of the prompt.")] = 20,
    negative_tokens: Annotated[int, typer.Option(help="Real tokens of the negative prompt.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Measure time, operations and memory of every guidance method, side by side."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from nasa_video.bench.case import BenchSettings
    from nasa_video.bench.measure import bench as measure
    from nasa_video.guidance.methods import split_methods

    settings = BenchSettings(
        model=model,
        random_weights=random_weights,
        layers=layers,
        width=width,
        height=height,
        chunks=chunks,
        repeats=repeats,
        device=device,
        dtype=dtype,
        attention=attention,
        compile=compile_model,
        decode=decode,
        methods=tuple(split_methods(methods)) if methods is not None else (),
        positive_tokens=positive_tokens,
        negative_tokens=negative_tokens,
    )
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TimeElapsedColumn())
    with shown_warnings(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bench", total=None)
        result = measure(
            settings, lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
        )
    show(result)
    if as_json:
        emit_json(result)


def show(result: dict[str, Any]) -> None:
    """The tables for people: as measured, extrapolated where layers were cut, and the model's own size."""
    from rich.console import Console

    out = Console()
    if not out.is_terminal:  # a file or a pipe has room; rich would take 80 columns
        out = Console(width=120)
    out.print(heading(result), highlight=False, soft_wrap=True)
    for title, columns in tables(result):
        out.print()
        out.print(title, highlight=False, soft_wrap=True)
        out.print(_table(columns))


Columns = list[tuple[str, list[str]]]


def tables(result: dict[str, Any]) -> list[tuple[str, Columns]]:
    """What is shown: a title, and columns of cells."""
    rows = result["methods"]
    own = result["own_size"]
    size = f"{result['width']} x {result['height']}"
    names = ("method", [row["title"] for row in rows])
    time: Columns = [
        names,
        ("keys", [" | ".join("+".join(str(n) for n in branch) for branch in row["keys"]) for row in rows]),
        ("ms a chunk", [_ms(row["ms_per_chunk"]) for row in rows]),
        ("quartiles", ["-".join(_ms(x) for x in row["ms_quartiles"]) for row in rows]),
        ("time", [f"{row['time_ratio'] - 1:+.1%}" for row in rows]),
        ("FPS", [f"{row['fps']:.2f}" for row in rows]),
    ]
    if rows[0]["cpu_ms_per_chunk"] is not None:
        time.append(("CPU ms", [_ms(row["cpu_ms_per_chunk"]) for row in rows]))
        time.append(("CPU time", [f"{row['cpu_time_ratio'] - 1:+.1%}" for row in rows]))
    if result["decode_ms"] is not None:
        time.append(("decoded", [f"{row['fps_with_decode']:.2f}" for row in rows]))
    memory: Columns = [
        names,
        ("history", [format_bytes(row["memory"]["history"]) for row in rows]),
        ("text keys", [format_bytes(row["memory"]["text_keys"]) for row in rows]),
        ("extra", [format_bytes(row["memory"]["extra"]) for row in rows]),
        ("once a prompt", [f"{_ms(row['prompt']['ms'])} ms" for row in rows]),
    ]
    if any(row["memory"]["peak_beside_weights"] is not None for row in rows):
        memory.append(("peak", [format_bytes(row["memory"]["peak_beside_weights"] or 0) for row in rows]))
    shown = [
        (f"Time, measured: {size}, {layers_text(result)}", time),
        (f"Memory beside the weights, measured: {size}, {layers_text(result)}", memory),
    ]
    if result["layers"] != result["model_layers"]:
        far = [row["extrapolated"] for row in rows]
        columns = [
            names,
            ("ms a chunk", [_ms(x["ms_per_chunk"]) for x in far]),
            ("FPS", [f"{x['fps']:.2f}" for x in far]),
            *((title, [format_bytes(x[key]) for x in far]) for title, key in MEMORY_TITLES),
        ]
        what = f"EXTRAPOLATED to all {result['model_layers']} layers, time by operations and memory by layers: {size}"
        shown.append((what, columns))
    what = f"Operations, counted and by formula: {size}, {layers_text(result)}, {result['chunks']} chunks"
    shown.append((what, [names, *flops([row["flops"] for row in rows])]))
    if (own["width"], own["height"], own["layers"], own["chunks"]) != (
        result["width"], result["height"], result["layers"], result["chunks"],
    ):  # fmt: skip
        size = f"{own['width']} x {own['height']}, all {own['layers']} layers, {own['chunks']} chunks"
        what = f"Operations at the model's own size, counted and by formula: {size}"
        shown.append((what, [names, *flops([row["own_size"] for row in rows])]))
    return shown


MEMORY_TITLES = (("history", "history"), ("text keys", "text_keys"), ("extra", "extra"))


def flops(rows: list[dict[str, float]]) -> Columns:
    """Columns of operations."""
    return [
        ("TFLOP, chunk 1", [f"{row['first_chunk_counted'] / 1e12:.4g}" for row in rows]),
        ("formula", [f"{row['first_chunk_analytic'] / 1e12:.4g}" for row in rows]),
        ("mean", [f"{row['mean_analytic'] / 1e12:.4g}" for row in rows]),
        ("FLOP", [f"{row['ratio'] - 1:+.2%}" for row in rows]),
    ]


def _table(columns: Columns) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    return table


def heading(result: dict[str, Any]) -> str:
    """What was measured, and on what."""
    load = result["load_average"][0]
    busy = "" if load is None else f", load average {load} before and {result['load_average'][1]} after"
    decode = "" if result["decode_ms"] is None else f"; decoding takes {_ms(result['decode_ms'])} ms a chunk"
    return (
        f"{result['model']} ({result['weights']} weights, {result['dtype']}, {result['attention']}"
        f"{', compiled' if result['compile'] else ''}) on {result['device_name']} "
        f"(torch {result['torch']}, threads {result['threads']}{busy})\n"
        f"{result['tokens_per_chunk']} tokens and {result['frames_per_chunk']} frames a chunk, steps {result['steps']} "
        f"and a clean pass; videos of {result['chunks']} chunks, {result['repeats']} a method, {result['order']} in "
        f"turns; prompt of {result['positive_tokens']} tokens, negative of {result['negative_tokens']}{decode}\n"
        "time, FLOP, extra: beside the first row, which is what the public code does; time is the median over turns, "
        "each paired with the first row's of the same turn; CPU time is what the process itself used, whatever else ran"
    )


def layers_text(result: dict[str, Any]) -> str:
    """How many layers ran."""
    if result["layers"] == result["model_layers"]:
        return f"all {result['layers']} layers"
    return f"CUT to {result['layers']} of {result['model_layers']} layers"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
