"""The results of a direction search: from logits to directions, and to files."""
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.files import write_whole

ALPHAS = 'mixed_scan.alphas'
# Entry of a checkpoint that holds the state of a search.
STATE = 'scan_search'


def check_k(k: int, candidates: Sequence[str]) -> None:
    """Raise ValueError if k of these candidates cannot be chosen."""
    if not 1 <= k <= len(candidates):
        raise ValueError(f'k={k} directions cannot be chosen from {len(candidates)} candidates: '
                         f'{", ".join(candidates)}')


def find_alphas(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return {name of a block: its logits (K,)}, from the input to the output.

    Raises:
        ValueError: there are no logits, or their number differs between blocks.
    """
    found = {name[:-len(f'.{ALPHAS}')]: value for name, value in state_dict.items() if name.endswith(f'.{ALPHAS}')}
    if not found:
        raise ValueError("no direction search in here: a supernet has weights called '...mixed_scan.alphas'")
    sizes = sorted({tuple(value.shape) for value in found.values()})
    if len(sizes) > 1:
        raise ValueError(f'blocks have different numbers of candidates: {sizes}')
    return {name: found[name]
            for name in sorted(found, key=lambda name: [int(part) for part in re.findall(r'\d+', name)])}


def top_directions(probabilities: Tensor, candidates: Sequence[str], k: int) -> list[list[str]]:
    """Return the k likeliest candidates of every block of probabilities (blocks, K), in the order of candidates."""
    check_k(k, candidates)
    chosen = probabilities.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    return [[candidates[index] for index in row] for row in chosen.tolist()]


def relative_entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of every row divided by that of the uniform distribution: 1 is undecided, 0 decided."""
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(1)
    return entropy / max(math.log(probabilities.shape[1]), 1e-12)


def unchanged(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> float:
    """Return the share of the chosen directions that were chosen before."""
    same = sum(len(set(a) & set(b)) for a, b in zip(before, now))
    return same / sum(map(len, now))


def search_result(alphas: Tensor, candidates: Sequence[str], blocks: Sequence[str], k: int,
                  provenance: dict) -> dict:
    """Return the content of directions.json, whose ``directions`` a backbone takes.

    Args:
        alphas: (blocks, K) logits.
        candidates: K scan names.
        blocks: names of the blocks.
        k: directions to choose for every block.
        provenance: configuration, seed, step and the like.
    """
    probabilities = alphas.double().softmax(1)
    return dict(
        directions=top_directions(probabilities, candidates, k),
        candidates=list(candidates),
        k=k,
        blocks=list(blocks),
        probabilities=[[round(p, 8) for p in row] for row in probabilities.tolist()],
        mean_probability={name: round(p, 8) for name, p in zip(candidates, probabilities.mean(0).tolist())},
        entropy=[round(value, 8) for value in relative_entropy(probabilities).tolist()],
        provenance=provenance)


def result_json(result: dict) -> str:
    """Return JSON with one line a block."""
    rows = {key: ',\n'.join(f'    {json.dumps(row)}' for row in result[key]) for key in ('directions', 'probabilities')}
    lines = [f'  {json.dumps(key)}: ' + (f'[\n{rows[key]}\n  ]' if key in rows else json.dumps(value))
             for key, value in result.items()]
    return '{\n' + ',\n'.join(lines) + '\n}\n'


def alphas_csv(steps: Sequence[int], alphas: Sequence[Tensor], candidates: Sequence[str], blocks: Sequence[str]) -> str:
    """Return CSV with logit and probability of every step, block and direction, one a line."""
    out = io.StringIO()
    out.write('step,block,direction,alpha,probability\n')
    for step, values in zip(steps, alphas):
        probabilities = values.double().softmax(1).tolist()
        for block, row, p in zip(blocks, values.tolist(), probabilities):
            out.writelines(f'{step},{block},{name},{a:.8g},{b:.8g}\n' for name, a, b in zip(candidates, row, p))
    return out.getvalue()


def write_search(folder: str, candidates: Sequence[str], blocks: Sequence[str], k: int,
                 history: Sequence[tuple[int, Tensor]], provenance: dict) -> dict:
    """Write directions.json, alphas.csv and the pictures of both, each whole or not at all.

    Args:
        folder: made if it does not exist.
        candidates, blocks, k, provenance: as for :func:`search_result`.
        history: (epoch or iteration, (blocks, K) logits) of every report; the last one counts.

    Returns:
        The content of directions.json.
    """
    from mmlocalmamba.visualization import draw_alphas, draw_directions  # needs matplotlib

    steps, alphas = [step for step, _ in history], [values for _, values in history]
    result = search_result(alphas[-1], candidates, blocks, k, provenance)
    probabilities = torch.stack(alphas).softmax(-1).numpy()
    files: dict[str, Any] = {'directions.json': result_json(result),
                             'alphas.csv': alphas_csv(steps, alphas, candidates, blocks)}
    # stages.2.blocks.0: LocalVim's layers have none
    stages = [len(list(group)) for stage, group in groupby(name.rpartition('.blocks.')[0] for name in blocks) if stage]
    pictures = {'directions.png': draw_directions(result['directions'], candidates, probabilities[-1], stages),
                'alphas.png': draw_alphas(steps, probabilities, candidates, blocks)}
    for name, figure in pictures.items():
        files[name] = partial(figure.savefig, format='png', dpi=110)
    for name, content in files.items():
        write_whole(os.path.join(folder, name), content)
    return result
