"""Figures of scan orders (the paper's Fig. 1), of the direction search (Figs. 4 and 5), and of a backbone's effective
receptive fields, SCAttn gates, and what its scans have read."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.directions import CANDIDATES, ScanTables, scan_index
from mmlocalmamba.layers import SCAttn
from mmlocalmamba.layers.ssm import DirectionalSSM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _panels(names: Sequence[str], H: int, W: int, columns: int, side: float) -> Figure:
    """Return a figure with axes for each scan, which show a grid of H x W tokens and the borders of its windows."""
    from matplotlib.figure import Figure

    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(side * columns, (side * H / W + 0.35) * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names):
        axes.set_xticks(np.arange(W + 1) - 0.5, labels=[])
        axes.set_yticks(np.arange(H + 1) - 0.5, labels=[])
        axes.grid(color='white', linewidth=0.4, alpha=0.5)
        axes.tick_params(length=0)
        axes.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5), aspect='equal')
        axes.set_title(name, fontsize=12, family='monospace')
        if window := re.fullmatch(r'w(\d+)(_flip)?', name):
            side_of_window = int(window.group(1))
            for edge in range(0, W, side_of_window):
                axes.axvline(edge - 0.5, color='black', linewidth=1.4, alpha=0.8)
            for edge in range(0, H, side_of_window):
                axes.axhline(edge - 0.5, color='black', linewidth=1.4, alpha=0.8)
    for axes in figure.axes[len(names):]:
        axes.set_axis_off()
    return figure


def draw_scan_orders(names: Sequence[str], H: int, W: int, image: np.ndarray | None = None, columns: int = 4) -> Figure:
    """Draw the path that each scan takes over a grid of tokens.

    Args:
        names: scan names.
        H, W: token grid.
        image: RGB image (h, w, 3), uint8, shown behind the grid and stretched to it.
        columns: panels per row.

    Returns:
        A matplotlib Figure. The path runs from dark (first step) to bright (last step); a dot marks its start. Black
        lines are the borders of windows.
    """
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection

    figure = _panels(names, H, W, columns, side=3.2)
    for axes, name in zip(figure.axes, names):
        order = scan_index(name, H, W, pad=False).numpy()
        points = np.stack([order % W, order // W], axis=-1).astype(float)
        if image is not None:
            axes.imshow(image, extent=(-0.5, W - 0.5, H - 0.5, -0.5), alpha=0.8, interpolation='bilinear')
        axes.add_collection(LineCollection(
            list(np.stack([points[:-1], points[1:]], axis=1)), cmap='plasma', array=np.arange(len(points) - 1),
            linewidths=1.6, path_effects=[patheffects.Stroke(linewidth=2.8, foreground='white', alpha=0.7),
                                          patheffects.Normal()]))
        axes.plot(*points[0], 'o', color='tab:red', markeredgecolor='white', markersize=7)
    return figure


def draw_scan_distances(names: Sequence[str], H: int, W: int, token: tuple[int, int] | None = None,
                        columns: int = 4) -> Figure:
    """Draw the distance in scan steps of every token from one token, for each scan.

    Args:
        names: scan names.
        H, W: token grid.
        token: row and column of the one token; by default 5/7 of H and W, on 14x14 tokens the centre of a 7x7 window.
        columns: panels per row.

    Returns:
        A matplotlib Figure with a logarithmic scale; a cross marks the token.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import StrMethodFormatter

    figure = _panels(names, H, W, columns, side=3.2)
    row, column = token or (5 * H // 7, 5 * W // 7)
    norm = LogNorm(1, max(2, H * W))
    for axes, name in zip(figure.axes, names):
        step = np.empty(H * W)
        step[scan_index(name, H, W, pad=False).numpy()] = np.arange(H * W)
        away = np.maximum(abs(step - step[row * W + column]), 1).reshape(H, W)
        shown = axes.imshow(away, norm=norm, cmap='viridis_r', extent=(-0.5, W - 0.5, H - 0.5, -0.5))
        axes.plot(column, row, 'x', color='tab:red', markersize=9, markeredgewidth=2.5)
    bar = figure.colorbar(shown, ax=figure.axes[:len(names)], label='steps away', shrink=0.8)
    bar.formatter = StrMethodFormatter('{x:g}')
    return figure


def _grid_of_blocks(axes: Axes, blocks: int, names: Sequence[str]) -> None:
    """Draw ticks and cell borders of a matrix with a column for each block and a row for each direction."""
    axes.set_xticks(range(0, blocks, max(1, blocks // 20)))
    axes.set_yticks(range(len(names)), labels=names, family='monospace', fontsize=8)
    axes.set_xticks(np.arange(blocks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which='minor', color='0.85', linewidth=0.5)
    axes.tick_params(which='minor', length=0)


def _base_names(names: Sequence[str]) -> list[str]:
    """Return the distinct names without ``_flip``, because a direction and its flip share a colour."""
    return list(dict.fromkeys(name.removesuffix('_flip') for name in names))


def _used_names(directions: Sequence[Sequence[str]]) -> list[str]:
    """Return the names that occur in any block: the paper's candidates first, in their order, then others."""
    used = list(dict.fromkeys(name for block in directions for name in block))
    return [name for name in CANDIDATES if name in used] + [name for name in used if name not in CANDIDATES]


def draw_directions(directions: Sequence[Sequence[str]], candidates: Sequence[str] | None = None,
                    probabilities: np.ndarray | None = None, stages: Sequence[int] | None = None) -> Figure:
    """Draw the directions of each block, like the paper's Figs. 4 and 5.

    Args:
        directions: scan names of every block.
        candidates: rows of the figure; by default the names that occur.
        probabilities: (blocks, candidates), shown as the shade of each cell.
        stages: number of blocks of every stage. Lines separate the stages, with their names above (S1, ... if a stage
            has only one block).

    Returns:
        A matplotlib Figure with a column for each block, a row for each candidate, and a disc for each chosen
        direction. A direction and its flip share a colour.
    """
    from matplotlib.figure import Figure

    candidates = _used_names(directions) if candidates is None else list(candidates)
    blocks, rows = len(directions), len(candidates)
    figure = Figure(figsize=(max(3.5, 0.3 * blocks + 1.6), 0.3 * rows + 1.1), layout='constrained')
    axes = figure.subplots()
    shades = np.zeros((blocks, rows)) if probabilities is None else np.asarray(probabilities)
    image = axes.imshow(shades.T, cmap='Blues', vmin=0, vmax=max(shades.max(), 2 / rows), aspect='auto')
    if probabilities is not None:
        figure.colorbar(image, ax=axes, label='probability')
    x, y = zip(*((block, candidates.index(name)) for block, names in enumerate(directions) for name in names))
    bases = _base_names(candidates)
    colors = [f'C{bases.index(candidates[row].removesuffix("_flip")) % 10}' for row in y]
    axes.scatter(x, y, s=60, c=colors, edgecolors='black', linewidths=0.6)
    stages = list(stages or [])
    for number, (end, depth) in enumerate(zip(np.cumsum(stages), stages), 1):
        if number < len(stages):
            axes.axvline(end - 0.5, color='0.3', linewidth=1.2)
        # A column is 0.3 inches wide, too narrow for the word.
        axes.annotate(f'stage {number}' if min(stages) > 1 else f'S{number}', (end - depth / 2 - 0.5, 1), (0, 4),
                      xycoords=('data', 'axes fraction'), textcoords='offset points', ha='center', fontsize=9)
    _grid_of_blocks(axes, blocks, candidates)
    axes.set_xlabel('block')
    return figure


def draw_alphas(steps: Sequence[int], probabilities: np.ndarray, candidates: Sequence[str], blocks: Sequence[str],
                columns: int = 5) -> Figure:
    """Draw the probabilities of a direction search over time, in a panel for each block.

    Args:
        steps: epochs or iterations of the reports.
        probabilities: (steps, blocks, candidates).
        candidates: scan names.
        blocks: names of the blocks.
        columns: panels per row.

    Returns:
        A matplotlib Figure. A direction and its flip share a colour; the flip is dashed.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(blocks))
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(2.4 * columns + 1.2, 1.7 * rows + 0.4), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    bases = _base_names(candidates)
    for index, (axes, block) in enumerate(zip(panels, blocks)):
        for k, name in enumerate(candidates):
            axes.plot(steps, probabilities[:, index, k], '--' if name.endswith('_flip') else '-', linewidth=1.1,
                      color=f'C{bases.index(name.removesuffix("_flip")) % 10}', label=name,
                      marker='.' if len(steps) == 1 else None)
        axes.set_title(block, fontsize=7)
        axes.tick_params(labelsize=6)
    for index, axes in enumerate(figure.axes[len(blocks):], len(blocks)):
        axes.set_axis_off()
        figure.axes[index - columns].tick_params(labelbottom=True)
    figure.supxlabel('epoch or iteration', fontsize=7)
    figure.supylabel('probability', fontsize=7)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=7)
    return figure


def receptive_fields(backbone: nn.Module, images: Tensor) -> list[np.ndarray]:
    """Compute the effective receptive field of every output of a backbone (Luo et al., arXiv 1701.04128).

    The feature vector at the centre of the map is projected on a random direction. The absolute gradient of the
    projection with respect to the image is summed over channels and images. A sum of the features, as is usual, does
    not work: it is constant after a LayerNorm, so its gradient is only rounding error.

    Args:
        backbone: module that returns a tuple of maps (B, C_i, H_i, W_i). It runs in evaluation mode; the modes of its
            submodules are restored.
        images: (B, channels, H, W), normalised as for training.

    Returns:
        A float64 array (H, W) with sum 1 for every output. The centre of a map of even size is the token to the lower
        right of the middle.

    Raises:
        ValueError: if an output is not a map.
    """
    with _evaluation_mode(backbone):
        fields = _sum_of_fields(backbone, images)
    return [field / field.sum() for field in fields]


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each submodule at the end."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _sum_of_fields(backbone: nn.Module, images: Tensor) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    fields: list[Any] = []
    for image in images:  # one at a time, to keep only one graph in memory
        image = image[None].clone().requires_grad_()
        outs = backbone(image)
        if any(out.dim() != 4 for out in outs):
            raise ValueError('receptive fields need maps (B, C, H, W), but the backbone returns '
                             f'{[tuple(out.shape) for out in outs]}; for LocalVim, set out_type="featmap"')
        fields = fields or [0] * len(outs)
        for index, out in enumerate(outs):
            centre = out[0, :, out.shape[2] // 2, out.shape[3] // 2]
            direction = torch.randn(len(centre), generator=generator).to(centre)
            gradient, = torch.autograd.grad(centre @ direction, image, retain_graph=index < len(outs) - 1)
            fields[index] = fields[index] + gradient[0].abs().sum(0).double().cpu().numpy()
    return fields


def square_of_share(field: np.ndarray, share: float, stride: int = 1) -> tuple[int, int, int]:
    """Return (row, column, side) of the smallest square around the centre that holds ``share`` of a receptive field.

    Args:
        field: (H, W).
        share: fraction of the field's sum, 0 to 1.
        stride: pixels of a token. The centre is that of the token at the middle of the map.

    Returns:
        The centre and the side in pixels. The square may extend beyond the image, where the field is 0.
    """
    row, col = ((size // stride // 2) * stride + stride // 2 for size in field.shape)
    sums = np.pad(field.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for half in range(max(field.shape) + 1):
        top, left = max(0, row - half), max(0, col - half)
        bottom, right = (min(size, centre + half) for size, centre in zip(field.shape, (row, col)))
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        if inside >= share * sums[-1, -1] * (1 - 1e-9):
            return row, col, 2 * half
    raise AssertionError('a square of twice the image size holds the whole field')


def draw_receptive_fields(fields: Sequence[np.ndarray], titles: Sequence[str], strides: Sequence[int],
                          shares: Sequence[float] = (0.5, 0.9), columns: int = 4) -> Figure:
    """Draw effective receptive fields, in a panel for each output.

    Args:
        fields: result of :func:`receptive_fields`.
        titles: titles of the panels.
        strides: strides of the outputs in pixels.
        shares: fractions of the field. A square around the centre that holds the fraction is drawn for each.
        columns: panels per row.

    Returns:
        A matplotlib Figure. Brightness is logarithmic over four decades below the 99.9th percentile, so that single
        bright pixels do not set the scale. The sides of the squares are below each panel.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(columns, len(fields))
    rows = -(-len(fields) // columns)
    height, width = fields[0].shape
    figure = Figure(figsize=(2.6 * columns + 0.6, (2.6 * height / width + 0.6) * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, field, title, stride in zip(panels.flat, fields, titles, strides):
        shown = field / np.percentile(field, 99.9)
        picture = axes.imshow(np.maximum(shown, 1e-4), cmap='magma', norm=LogNorm(1e-4, 1),
                              extent=(0, width, height, 0), interpolation='nearest')
        texts = []
        for share, style in zip(shares, ('-', '--', ':')):
            row, col, side = square_of_share(field, share, stride)
            axes.add_patch(Rectangle((col - side / 2, row - side / 2), side, side, fill=False, edgecolor='white',
                                     linestyle=style, linewidth=1.0))
            texts.append(f'{share:.0%} in {side} px')
        axes.set(title=title, xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())
        axes.title.set_fontsize(10)
        axes.set_xlabel(', '.join(texts), fontsize=8)
    for axes in list(panels.flat)[len(fields):]:
        axes.set_axis_off()
    bar = figure.colorbar(picture, ax=panels, shrink=0.8, aspect=30, ticks=(1e-4, 1e-2, 1))
    bar.set_label('gradient, relative', fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


@torch.no_grad()
def scattn_gates(backbone: nn.Module, images: Tensor) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Return the gates by which SCAttn multiplies the channels of each direction.

    Args:
        backbone: LocalVim or LocalVMamba. It runs in evaluation mode; the modes of its submodules are restored.
        images: (B, channels, H, W), normalised as for training.

    Returns:
        The name of every block, from input to output, and {direction: gates}. The gates are float64 arrays (D,) for the
        D inner channels, averaged over images, and over tokens if there is a spatial branch.

    Raises:
        ValueError: if the backbone has no SCAttn.
    """
    mixers = {name: module for name, module in backbone.named_modules() if hasattr(module, 'directions')
              and isinstance(getattr(module, 'scattn', None), SCAttn)}
    if not mixers:
        raise ValueError(f'{type(backbone).__name__} has no SCAttn module: build it without scattn=False')
    sums: dict[str, Any] = {}

    def add(name: str) -> Callable[[SCAttn, tuple[Tensor, ...]], None]:
        def hook(scattn: SCAttn, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + scattn.gate(*inputs).mean(dim=(0, 2)).double().cpu().numpy()
        return hook

    hooks = [mixer.scattn.register_forward_pre_hook(add(name)) for name, mixer in mixers.items()]
    try:
        with _evaluation_mode(backbone):
            for image in images:
                backbone(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [(name.removesuffix('.mixer'), dict(zip(mixer.directions, sums[name] / len(images))))
            for name, mixer in mixers.items()]


def draw_gates(gates: Sequence[tuple[str, dict[str, np.ndarray]]]) -> Figure:
    """Draw SCAttn's gates, with a column for each block and a row for each direction.

    Args:
        gates: result of :func:`scattn_gates`.

    Returns:
        A matplotlib Figure with the mean over the channels, about 0.5 in an untrained module, and the standard
        deviation over the channels. Grey cells are directions that the block does not have.
    """
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    names = _used_names([list(block) for _, block in gates])
    mean, spread = (np.array([[function(block[name]) if name in block else np.nan for _, block in gates]
                              for name in names]) for function in (np.mean, np.std))
    least = 0.05  # keeps small differences pale
    halfrange = max(least, np.nanmax(np.abs(mean - 0.5)))
    panels = (('mean over channels', mean, dict(cmap='RdBu_r', norm=CenteredNorm(0.5, halfrange))),
              ('standard deviation over channels', spread, dict(cmap='Purples', vmin=0,
                                                                vmax=max(least, np.nanmax(spread)))))
    figure = Figure(figsize=(max(4.5, 0.3 * len(gates) + 2.4), 2 * (0.3 * len(names) + 0.7)), layout='constrained')
    for axes, (title, values, style) in zip(figure.subplots(2, 1, sharex=True), panels):
        picture = axes.imshow(values, aspect='auto', **style)
        figure.colorbar(picture, ax=axes).ax.tick_params(labelsize=7)
        axes.set_facecolor('0.88')
        axes.set_title(title, fontsize=9)
        _grid_of_blocks(axes, len(gates), names)
    axes.set_xlabel('block')
    return figure


def read_by(ssm: DirectionalSSM, x: Tensor, tables: ScanTables, in_scan_order: bool, token: int) -> Tensor:
    """Return how much a token reads of each token, for every direction of a scan.

    With the recurrence h_t = exp(A dt_t) h_(t-1) + dt_t B_t u_t and y_t = C_t h_t, y of step t contains u of step s
    with the factor C_t exp(A (dt_(s+1) + ... + dt_t)) dt_s B_s. Returned is the mean of its absolute value over the
    channels. The skip connection is not part of it, nor is what u holds (as in VMamba's maps, arXiv 2401.10166).

    Args:
        ssm: the scan.
        x, tables, in_scan_order: its inputs for one image; see :func:`mmlocalmamba.layers.project_and_scan`.
        token: index of the token that reads.

    Returns:
        (K, L) float32. Tokens that come later in a direction have 0.
    """
    x_proj, dt_proj, dt_bias, A_log, _ = (weight.float() for weight in ssm.weights())
    rank, N = dt_proj.shape[-1], A_log.shape[-1]
    found = x.new_zeros(*tables.inv.shape, dtype=torch.float32)
    for k, (src, inv) in enumerate(zip(*tables)):
        step = int(inv[token])
        src = src[:step + 1].long()
        if in_scan_order:
            projected = x[0, k, :step + 1].float() @ x_proj[k].T
        else:
            projected = x[0].float() @ x_proj[k].T
            projected = projected[src.clamp(min=0)] * (src >= 0)[:, None]  # pads are zeros
        low, B, C = projected.split((rank, N, N), dim=-1)
        dt = F.softplus(low @ dt_proj[k].T + dt_bias[k])
        later = dt.sum(0) - dt.cumsum(0)
        # One state at a time: (steps, channels).
        factor = sum(C[-1, n] * (-A_log[k, :, n].exp() * later).exp() * dt * B[:, n, None] for n in range(N))
        real = src >= 0
        found[k, src[real]] = factor.abs().mean(1)[real]
    return found


@torch.no_grad()
def scan_readings(backbone: nn.Module, image: Tensor, point: tuple[int, int],
                  blocks: Sequence[int] | None = None) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Return which tokens the token at one point of an image has read in the scans of a backbone's blocks.

    Args:
        backbone: LocalVim or LocalVMamba. It runs in evaluation mode; the modes of its submodules are restored.
        image: (1, 3, H, W), normalised as for training.
        point: row and column of a pixel.
        blocks: numbers of blocks, from 0; None for four at equal distances (all, if there are fewer).

    Returns:
        The name of every block, from input to output, and {direction: (h, w) float64}; see :func:`read_by`.

    Raises:
        ValueError: the point is outside of the image, a number is unknown, or the backbone is one of a search.
    """
    H, W = image.shape[-2:]
    if not (0 <= point[0] < H and 0 <= point[1] < W):
        raise ValueError(f'point {tuple(point)} is outside of the image of {H}x{W} pixels')
    mixers = [(name, module) for name, module in backbone.named_modules()
              if isinstance(getattr(module, 'ssm', None), DirectionalSSM)]
    count = len(mixers)
    if blocks is None:
        blocks = sorted({count * (place + 1) // 4 - 1 for place in range(4)} - {-1})
    if not all(0 <= index < count for index in blocks):
        raise ValueError(f'blocks must be numbers from 0 to {count - 1}, got {list(blocks)}')
    found: dict[str, dict[str, np.ndarray]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def note_size(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
            sizes[name] = inputs[1] if len(inputs) == 3 else backbone.token_grid(H, W)
        return hook

    def read(name: str, names: Sequence[str]) -> Callable[[DirectionalSSM, tuple[Any, ...]], None]:
        def hook(ssm: DirectionalSSM, inputs: tuple[Any, ...]) -> None:
            x, tables, *order = inputs
            h, w = sizes[name]
            middle, extra = h * w // 2, tables.inv.shape[1] - h * w
            token = min(point[0] * h // H, h - 1) * w + min(point[1] * w // W, w - 1)
            rows = read_by(ssm, x, tables, bool(order and order[0]), token + extra * (token >= middle))
            rows = torch.cat([rows[:, :middle], rows[:, middle + extra:]], 1).unflatten(1, (h, w))
            found[name] = dict(zip(names, rows.double().cpu().numpy()))
        return hook

    hooks = []
    for name, mixer in (mixers[index] for index in sorted(blocks)):
        hooks += [mixer.register_forward_pre_hook(note_size(name)),
                  mixer.ssm.register_forward_pre_hook(read(name, mixer.directions))]
    try:
        with _evaluation_mode(backbone):
            backbone(image)
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        raise ValueError(f'{type(backbone).__name__} mixes its directions in a search: derive directions first')
    return [(name.removesuffix('.mixer'), rows) for name, rows in found.items()]


def draw_readings(readings: Sequence[tuple[str, dict[str, np.ndarray]]], image: np.ndarray,
                  point: tuple[int, int]) -> Figure:
    """Draw what one token has read, with a row for each block and a column for each direction and for their sum.

    Args:
        readings: result of :func:`scan_readings`.
        image: (H, W, 3) uint8, shown in the first column.
        point: row and column of the pixel, marked by a cross.

    Returns:
        A matplotlib Figure. Each panel is scaled to its own maximum; brightness is the square root.
    """
    from matplotlib.figure import Figure

    H, W = image.shape[:2]
    columns = 2 + max(len(rows) for _, rows in readings)
    figure = Figure(figsize=(1.9 * columns, (1.9 * H / W + 0.3) * len(readings)), layout='constrained')
    panels = figure.subplots(len(readings), columns, squeeze=False)
    for line, (name, rows) in zip(panels, readings):
        line[0].imshow(image)
        line[0].set_title(name, fontsize=8)
        for axes, (title, row) in zip(line[1:], [*rows.items(), ('sum', np.sum([*rows.values()], axis=0))]):
            axes.imshow(np.sqrt(row / max(row.max(), np.finfo(float).tiny)), cmap='magma', vmin=0, vmax=1,
                        extent=(0, W, H, 0), interpolation='nearest')
            axes.set_title(title, fontsize=9, family='monospace')
        for axes in line:
            axes.plot(point[1] + 0.5, point[0] + 0.5, '+', color='cyan', markersize=8)
            axes.set(xticks=(), yticks=())
        for axes in line[2 + len(rows):]:
            axes.set_axis_off()
    return figure
