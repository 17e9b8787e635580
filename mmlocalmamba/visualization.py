"""Pictures of scan orders, like the paper's Fig. 1."""
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
