"""``nasa-video bench``: what a chunk costs under each method."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nasa_video.cli.console import console, emit_json, shown_warnings


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
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on CUDA, else float32")
    ] = None,
    attention: Annotated[str, typer.Option(help="Kernel of the text attention: sdpa or xformers.")] = "sdpa",
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the transformer.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Time the VAE's decoding as well.")] = False,
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods, with commas: nasa-folded,cfg.", show_default="all")
    ] = None,
    positive_tokens: Annotated[int, typer.Option(help="Real tokens of the prompt.")] = 20,
    negative_tokens: Annotated[int, typer.Option(help="Real tokens of the negative prompt.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Measure time, operations and memory of every guidance method, side by side."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from nasa_video.bench import BenchSettings
    from nasa_video.bench import bench as measure

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
        methods=tuple(name.strip() for name in methods.split(",")) if methods is not None else (),
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
    from rich.table import Table

    out = Console()
    out.print(heading(result), highlight=False, soft_wrap=True)
    cut = result["layers"] != result["model_layers"]
    measured = Table(title=f"Measured: {result['width']} x {result['height']}, {layers_text(result)}", title_justify="left")
    for name in ("method", "text keys"):
        measured.add_column(name)
    names = ["ms a chunk", "quartiles", "time", "FPS", "TFLOP a chunk", "FLOP", "history", "text keys", "extra", "once a prompt"]
    if result["decode_ms"] is not None:
        names.insert(4, "FPS decoded")
    if any(row["memory"]["peak_beside_weights"] for row in result["methods"]):
        names.append("peak")
    for name in names:
        measured.add_column(name, justify="right")
    for row in result["methods"]:
        measured.add_row(*measured_row(row, result, names))
    out.print(measured)
    if cut:
        table = Table(
            title=f"Extrapolated to all {result['model_layers']} layers (not measured: time by operations, memory by layers)",
            title_justify="left",
        )
        for name in ("method", "ms a chunk", "FPS", "history", "text keys", "extra"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in result["methods"]:
            far = row["extrapolated"]
            sizes = (size_text(far[name]) for name in ("history", "text_keys", "extra"))
            table.add_row(row["title"], f"{far['ms_per_chunk']:.0f}", f"{far['fps']:.2f}", *sizes)
        out.print(table)
    own = result["own_size"]
    table = Table(
        title=f"Operations at the model's own size: {own['width']} x {own['height']}, {own['layers']} layers, "
        f"mean of {own['chunks']} chunks (counted, nothing computed)",
        title_justify="left",
    )
    for name in ("method", "TFLOP a chunk, counted", "analytic", "to the unguided padded"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result["methods"]:
        flops = row["own_size"]
        table.add_row(
            row["title"],
            f"{flops['counted'] / 1e12:.2f}",
            f"{flops['analytic'] / 1e12:.2f}",
            f"{flops['ratio_counted'] - 1:+.2%}",
        )
    out.print(table)


def heading(result: dict[str, Any]) -> str:
    """What was measured, and on what."""
    load = result["load_average"][0]
    busy = "" if load is None else f", load average {load} before and {result['load_average'][1]} after"
    return (
        f"{result['model']} ({result['weights']} weights, {result['dtype']}, {result['attention']}"
        f"{', compiled' if result['compile'] else ''}) on {result['device_name']} "
        f"(torch {result['torch']}, {result['threads']} threads{busy})\n"
        f"{result['tokens_per_chunk']} tokens and {result['frames_per_chunk']} frames a chunk, {result['steps']} steps and a "
        f"clean pass; {result['chunks']} chunks a video, {result['repeats']} videos a method, {result['order']} in turns; "
        f"prompt of {result['positive_tokens']} tokens, negative of {result['negative_tokens']}\n"
        "time and FLOP are beside the unguided padded model (the median of turns paired with its own); extra is its memory"
        " beyond that model's"
    )


def layers_text(result: dict[str, Any]) -> str:
    """How many layers ran."""
    if result["layers"] == result["model_layers"]:
        return f"all {result['layers']} layers"
    return f"CUT to {result['layers']} of {result['model_layers']} layers"


def measured_row(row: dict[str, Any], result: dict[str, Any], names: list[str]) -> list[str]:
    """Cells of one method."""
    low, high = row["ms_quartiles"]
    memory, flops = row["memory"], row["flops"]
    keys = " | ".join(" + ".join(str(n) for n in branch) for branch in row["keys"])
    cells = [
        row["title"],
        keys,
        f"{row['ms_per_chunk']:.0f}" if row["ms_per_chunk"] >= 100 else f"{row['ms_per_chunk']:.1f}",
        f"{low:.0f} to {high:.0f}" if high >= 100 else f"{low:.1f} to {high:.1f}",
        f"{row['time_ratio'] - 1:+.1%}",
        f"{row['fps']:.2f}",
        f"{flops['counted'] / 1e12:.3f}",
        f"{flops['ratio_counted'] - 1:+.2%}",
        size_text(memory["history"]),
        size_text(memory["text_keys"]),
        size_text(memory["extra"]),
        f"{row['prompt']['ms']:.0f} ms",
    ]
    if "FPS decoded" in names:
        cells.insert(6, f"{row['fps_with_decode']:.2f}")
    if "peak" in names:
        peak = memory["peak_beside_weights"]
        cells.append("" if peak is None else size_text(peak))
    return cells


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
