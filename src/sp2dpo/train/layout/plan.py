"""What a batch of pairs looks like as one packed row [P|C|R|P|C|R|…]: index arithmetic on a padded batch, no model.

P is the longest common prefix of a pair's two sequences, C and R what is left of each. Positions of R go on from P. A
token of P is computed once and serves both sequences, completion tokens that both begin with included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["plan"]


def plan(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed row of a collated batch: `input_ids`, `attention_mask`, `completion_mask` (2B, L), chosen rows first.

    Rows are padded on the right. Of the result, T tokens in the row, N scored tokens, M ≥ N scored places in the grid:

    - `input_ids`, `position_ids` (1, T);
    - `lengths` (B, 3): tokens of P, C and R of each pair;
    - `query_ends`, `key_ends` (S+1,) int32: ends of the attention segments, [P|C] over itself and R over [P|R], in the
      row and in the row gathered by `keys` (K,); segments without a query are left out;
    - `predictors`, `labels` (1, N): the place whose hidden state predicts a completion token, and that token;
    - `sources`, `targets` (M,): which scored token belongs in which cell of the flattened (2B, L−1) grid.
    """
    ids, present, completion = (_by_pair(batch[name]) for name in ("input_ids", "attention_mask", "completion_mask"))
    present = present.bool()
    shared = ((ids[:, 0] == ids[:, 1]) & present.all(dim=1)).long().cumprod(dim=1).bool()
    kept = present.clone()
    kept[:, 1] &= ~shared
    place = _count(kept)
    place[:, 1] = torch.where(shared, place[:, 0], place[:, 1])
    positions = torch.arange(ids.size(-1)).expand_as(kept)
    return {
        "input_ids": ids[kept][None],
        "position_ids": positions[kept][None],
        **_segments(present, kept, shared, place),
        **_scores(ids, (completion.bool() & present)[..., 1:], shared[:, 1:], place),
    }


def _by_pair(rows: Tensor) -> Tensor:
    """(2B, L), chosen rows first, to (B, 2, L)."""
    return rows.view(2, -1, rows.size(-1)).transpose(0, 1)


def _count(mask: Tensor) -> Tensor:
    """The rank of every true cell among the true cells, in reading order."""
    return (mask.flatten().cumsum(0) - 1).view_as(mask)


def _segments(present: Tensor, kept: Tensor, shared: Tensor, place: Tensor) -> dict[str, Tensor]:
    prefix, tokens, keys = shared.sum(-1), kept.sum(-1), present.sum(-1)
    asked = tokens > 0
    return {
        "lengths": torch.stack([prefix, tokens[:, 0] - prefix, tokens[:, 1]], dim=1),
        "query_ends": _ends(tokens[asked]),
        "key_ends": _ends(keys[asked]),
        "keys": place[present & asked[..., None]],
    }


def _ends(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0), (1, 0)).int()


def _scores(ids: Tensor, scored: Tensor, shared: Tensor, place: Tensor) -> dict[str, Tensor]:
    """`scored` and `shared` are of tokens 1 … L−1: token t is predicted at t−1 and stands in column t−1 of the grid.

    A shared token is a completion token of both sequences or of neither, since both have the same prompt.
    """
    needed = scored.clone()
    needed[:, 1] &= ~shared
    source = _count(needed)
    source[:, 1] = torch.where(shared, source[:, 0], source[:, 1])
    cells = torch.arange(scored.numel()).view(2, len(scored), -1).transpose(0, 1)
    return {
        "predictors": place[..., :-1][needed][None],
        "labels": ids[..., 1:][needed][None],
        "sources": source[scored],
        "targets": cells[scored],
    }
