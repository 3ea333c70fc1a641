"""Plan files in words, tables and as a page. From data to text, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from deepopt.planner.plan_file import PlanFile
from deepopt.planner.profile import DeviceSection
from deepopt.planner.profile_result import repeats
from deepopt.schedule.draw_files import draw_svg
from deepopt.schedule.simulate import Timeline
from deepopt_cli.output import human_percent, ranges, table


def plan_file_lines(plan_file: PlanFile) -> list[str]:
    """A plan file for the terminal.

    Args:
        plan_file: with its prediction.
    """
    model, pipeline = plan_file.model, plan_file.pipeline
    replicas = f" x {pipeline.replicas} replicas" if pipeline.replicas > 1 else ""
    lines = [
        f"model       {model.factory}, {len(plan_file.layers)} layers, {model.dtype}, micro-batches of "
        f"{model.microbatch_size} x {model.sequence_length} tokens",
        f"devices     {device_words(plan_file.hardware.devices)}",
        f"figures     {source_words(plan_file)}",
        f"pipeline    {pipeline.ranks} ranks{replicas}, placement {pipeline.placement}, schedule "
        f"{pipeline.schedule}, {pipeline.microbatches} micro-batches",
        *predicted_lines(plan_file),
        "",
        layer_table(plan_file),
        "",
        stage_table(plan_file),
    ]
    if len(plan_file.hardware.links) > 0:
        lines += ["", link_table(plan_file)]
    return lines


def predicted_lines(plan_file: PlanFile) -> list[str]:
    """What a step will take.

    Args:
        plan_file: with its prediction; without one there are no lines.
    """
    found = plan_file.predicted
    if found is None or found.step_ms is None:
        return []
    likely = ""
    if found.range_ms is not None:
        likely = f" ({found.range_ms[0]:.1f} to {found.range_ms[1]:.1f} with layers at their quartiles)"
    gap = "" if found.gap is None else f", {human_percent(found.gap)} above the lower bound"
    shared = plan_file.hardware.shared_cores
    cores = f", workers share {shared} cores" if shared else ""
    taken = sum(own.processes + own.threads for own in plan_file.hardware.background)
    if shared and taken:
        cores += f", of which the head, Ray and threads beside the training take {taken:.2f}"
    lines = [
        f"predicted   step {found.step_ms:.1f} ms{likely}, bubble {human_percent(found.bubble)}{gap}{cores}"
    ]
    if found.warm_up_ms:
        lines.append(
            f"warm-up     up to {found.warm_up_ms:.1f} ms more while routers of experts warm up, at most "
            "the first elb.monitor_freq steps"
        )
    return lines


def source_words(plan_file: PlanFile) -> str:
    """Where the figures are from.

    Args:
        plan_file: says it.
    """
    if plan_file.source == "emulated":
        return f"emulated: devices took the times that the job states, {plan_file.made}"
    if plan_file.source == "analytic":
        return f"analytic, nothing was measured: {plan_file.basis}, {plan_file.made}"
    return f"measured, {plan_file.made}"


def device_words(devices: Sequence[DeviceSection]) -> str:
    """Devices, and how fast they are where they differ.

    Args:
        devices: of all workers.
    """
    names = [device.name for device in devices]
    words = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    factors = [device.factor for device in devices]
    if len(set(factors)) > 1:
        words += f", time factors {' '.join(f'{factor:.2f}' for factor in factors)}"
    return words


def layer_table(plan_file: PlanFile) -> str:
    """Layers with their times and sizes; those in a row that are alike as one.

    Args:
        plan_file: what to show.
    """
    figures = dict(zip((x.name for x in plan_file.layers), plan_file.resolved(), strict=True))
    recomputes = any(times.prepare for times, _ in figures.values())
    rows: list[Sequence[object]] = []
    for layer, count in repeats(plan_file.layers):
        times, sizes = figures[layer.name]
        rows.append(
            (
                layer.name,
                layer.kind,
                count,
                f"{times.forward:.2f}",
                f"{times.input:.2f}",
                f"{times.weight:.2f}",
                *([f"{times.prepare:.2f}"] if recomputes else []),
                f"{times.update:.2f}",
                human_percent(times.spread),
                f"{sizes.activation:.2f}",
                f"{sizes.parameters:.2f}",
                f"{sizes.gradients:.2f}",
                f"{sizes.optimizer:.2f}",
                f"{sizes.output:.2f}",
            )
        )
    header = [
        "layer",
        "kind",
        "times",
        "F ms",
        "I ms",
        "W ms",
        *(["R ms"] if recomputes else []),
        "update",
        "spread",
        "activ. MB",
        "param.",
        "grad.",
        "optim.",
        "cut",
    ]
    return table(header, rows)


def stage_table(plan_file: PlanFile) -> str:
    """Stages, where they lie, what they take and what their ranks hold.

    Args:
        plan_file: with its prediction.
    """
    plan, found = plan_file.plan(plan_id=1), plan_file.predicted
    names = plan.layer_names
    rows: list[Sequence[object]] = []
    for number, stage in enumerate(plan_file.stages):
        layers = plan.stage_layers(number)
        first, last = names[layers.start], names[layers.stop - 1]
        memory = None
        if found is not None and any(found.memory_mb):
            memory = f"{max(found.memory_mb[rank] for rank in stage.ranks):.1f}"
        rows.append(
            (
                number,
                len(layers),
                first if first == last else f"{first} .. {last}",
                ranges(plan.holders(number)),
                None if found is None else f"{found.stage_ms[number]:.2f}",
                memory,
            )
        )
    header = (
        "stage",
        "layers",
        "from .. to",
        "ranks",
        "ms a micro-batch",
        "peak MB of its rank",
    )
    return table(header, rows)


def link_table(plan_file: PlanFile) -> str:
    """What was measured of links.

    Args:
        plan_file: names them.
    """
    rows = [
        (
            f"{link.ranks[0]}-{link.ranks[1]}",
            link.hosts[0] if link.hosts[0] == link.hosts[1] else " - ".join(link.hosts),
            f"{link.latency_us:.0f}",
            "any" if link.gb_per_s is None else f"{link.gb_per_s:.2f}",
            f"{link.core_us:.0f}",
            human_percent(link.error),
        )
        for link in plan_file.hardware.links
    ]
    return table(
        ("link", "hosts", "latency us", "GB/s", "CPU us a message", "off the fit"), rows
    )


def plan_page(plan_file: PlanFile, timeline: Timeline) -> str:
    """A page with the drawing, the stages and the layers.

    Args:
        plan_file: with its prediction.
        timeline: of its first replica.
    """
    return "\n".join(_page(plan_file, timeline)) + "\n"


def _page(plan_file: PlanFile, timeline: Timeline) -> Iterator[str]:
    title = f"Plan of {plan_file.model.factory}"
    yield "<!doctype html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield "<style>body{font:14px sans-serif;margin:2em;color:#222}pre{font-size:12px}"
    yield "div{overflow-x:auto}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    head, *_ = "\n".join(plan_file_lines(plan_file)).split("\n\n")
    yield f"<pre>{escape(head)}</pre>"
    yield f"<div>{draw_svg(timeline)}</div>"
    for heading, text in (
        ("Stages", stage_table(plan_file)),
        ("Layers", layer_table(plan_file)),
        ("Links", link_table(plan_file) if plan_file.hardware.links else ""),
    ):
        if text:
            yield f"<h2>{heading}</h2><pre>{escape(text)}</pre>"
    yield "</body></html>"
