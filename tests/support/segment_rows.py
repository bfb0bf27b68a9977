"""The rows of sequences as recurrent layers are given them, on the host."""

from collections.abc import Sequence

import torch

from windlass.decoder.state_rows import StateRows, StateSegment


def rows_of(segments: Sequence[StateSegment]) -> StateRows:
    single = [one for one in segments if one.num_rows == 1 and not one.is_prompt]
    rows, slots = [one.first_row for one in single], [one.slot for one in single]
    return StateRows(segments, torch.tensor(rows).long(), torch.tensor(slots).long())
