"""Pictures of scan orders (the paper's Fig. 1) and of the direction search (Figs. 4 and 5)."""
from collections.abc import Sequence

import numpy as np

from mmlocalmamba.scans import scan_index


def draw_scan_orders(names: Sequence[str], H: int, W: int, image: np.ndarray | None = None, columns: int = 4):
    """Draw the path that each scan takes over a grid of tokens.

    Args:
        names: scan names.
        H, W: token grid.
        image: (h, w, 3) uint8 RGB shown behind the grid, stretched to it.
        columns: panels per row.

    Returns:
        A matplotlib Figure; the path runs from dark (first step) to bright (last), a dot marks where it starts.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    side = 2.6
    figure = Figure(figsize=(side * columns, (side * H / W + 0.35) * rows), layout='constrained')
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names):
        order = scan_index(name, H, W, pad=False).numpy()
        points = np.stack([order % W, order // W], axis=-1).astype(float)
        if image is not None:
            axes.imshow(image, extent=(-0.5, W - 0.5, H - 0.5, -0.5), alpha=0.45, interpolation='bilinear')
        axes.set_xticks(np.arange(W + 1) - 0.5, labels=[])
        axes.set_yticks(np.arange(H + 1) - 0.5, labels=[])
        axes.grid(color='0.8', linewidth=0.5)
        axes.tick_params(length=0)
        axes.add_collection(LineCollection(np.stack([points[:-1], points[1:]], axis=1), cmap='viridis',
                                           array=np.arange(len(points) - 1), linewidths=1.8))
        axes.plot(*points[0], 'o', color='tab:red', markersize=5)
        axes.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5), aspect='equal')
        axes.set_title(name, fontsize=11, family='monospace')
    for axes in figure.axes[len(names):]:
        axes.set_axis_off()
    return figure


def draw_directions(directions: Sequence[Sequence[str]], candidates: Sequence[str] | None = None,
                    probabilities: np.ndarray | None = None):
    """Draw which directions each block has, like the paper's Figs. 4 and 5.

    Args:
        directions: scan names of every block.
        candidates: rows of the picture; by default the names that occur.
        probabilities: (blocks, candidates), shown as the shade of each cell.

    Returns:
        A matplotlib Figure: one column a block, one row a candidate, a disc for each chosen direction.
    """
    from matplotlib.figure import Figure

    if candidates is None:
        candidates = list(dict.fromkeys(name for block in directions for name in block))
    candidates = list(candidates)
    blocks, rows = len(directions), len(candidates)
    figure = Figure(figsize=(max(3.5, 0.3 * blocks + 1.6), 0.3 * rows + 1.1), layout='constrained')
    axes = figure.subplots()
    shades = np.zeros((blocks, rows)) if probabilities is None else np.asarray(probabilities)
    image = axes.imshow(shades.T, cmap='Blues', vmin=0, vmax=max(shades.max(), 2 / rows), aspect='auto')
    if probabilities is not None:
        figure.colorbar(image, ax=axes, label='probability')
    x, y = zip(*((block, candidates.index(name)) for block, names in enumerate(directions) for name in names))
    axes.scatter(x, y, s=42, color='tab:orange', edgecolors='black', linewidths=0.6)
    axes.set_xticks(range(0, blocks, max(1, blocks // 20)))
    axes.set_yticks(range(rows), labels=candidates, family='monospace', fontsize=8)
    axes.set_xticks(np.arange(blocks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which='minor', color='0.85', linewidth=0.5)
    axes.tick_params(which='minor', length=0)
    axes.set_xlabel('block')
    return figure


def draw_alphas(steps: Sequence[int], probabilities: np.ndarray, candidates: Sequence[str], blocks: Sequence[str],
                columns: int = 5):
    """Draw the probabilities of a direction search over time, a panel a block.

    Args:
        steps: epochs or iterations.
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
    bases = list(dict.fromkeys(name.removesuffix('_flip') for name in candidates))
    for index, (axes, block) in enumerate(zip(panels, blocks)):
        for k, name in enumerate(candidates):
            axes.plot(steps, probabilities[:, index, k], '--' if name.endswith('_flip') else '-', linewidth=1.1,
                      color=f'C{bases.index(name.removesuffix("_flip")) % 10}', label=name,
                      marker='.' if len(steps) == 1 else None)
        axes.set_title(block, fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in figure.axes[len(blocks):]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=7)
    return figure
