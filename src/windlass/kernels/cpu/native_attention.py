"""Attention of the native library, and the way of rows into the cache. Shape legend:
kernels/interface.py."""

import ctypes as c

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.matrices import TYPES, elements_together, floats
from windlass.kernels.cpu.session import Session
from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.tensors import PagedRows

_TILE_ITEMS = 64  # rows times heads of a group that attention takes together (MQ in attention.h)


def attention(
    session: Session,
    q_THd: torch.Tensor,
    keys: PagedRows,
    values: PagedRows,
    work: AttentionWork,
    options: AttentionOptions,
) -> torch.Tensor:
    """See `Kernels.attention`."""
    q_THd = q_THd.contiguous()
    num_rows, num_heads, key_dim = q_THd.shape
    out_THv = session.empty(num_rows, num_heads, options.value_dim)
    kv_heads, page_tokens = keys.rows_PKBd.shape[1:3]
    tiles = session.tiles.of(work, max(1, _TILE_ITEMS // (num_heads // kv_heads)))
    sinks = None if options.sinks_H is None else floats(options.sinks_H)
    structure = lib.Attention(
        q=q_THd.data_ptr(), out=out_THv.data_ptr(),
        num_heads=num_heads, num_kv_heads=kv_heads,
        key_dim=key_dim, value_dim=options.value_dim,
        scale=options.scale, window=options.window or 0,
        sinks=None if sinks is None else sinks.data_ptr(), page_tokens=page_tokens,
        keys=_cache(keys), values=_cache(values),
        tiles=c.addressof(tiles), num_tiles=len(tiles),
    )  # fmt: skip
    session.call("wl_attend", structure, keep=sinks)
    return out_THv


def write_rows(
    session: Session,
    store: PagedRows,
    pages_T: torch.Tensor,
    offsets_T: torch.Tensor,
    x_TKd: torch.Tensor,
) -> None:
    """See `Kernels.write_rows`."""
    x_TKd = elements_together(x_TKd)
    row, head, _ = x_TKd.stride()
    session.call(
        "wl_write_rows",
        x_TKd.data_ptr(), row, head, *x_TKd.shape, _cache(store),
        pages_T.data_ptr(), offsets_T.data_ptr(), store.rows_PKBd.shape[2],
    )  # fmt: skip


def _cache(store: PagedRows) -> lib.Cache:
    rows, scales = store.rows_PKBd, store.scales_PKB
    page, head, token, one = rows.stride()
    assert one == 1, "rows of keys and values lie side by side"
    assert scales is None or scales.is_contiguous(), "a scale for each row, in their order"
    item = rows.itemsize
    return lib.Cache(
        data=rows.data_ptr(), page_stride=page * item, head_stride=head * item,
        token_stride=token * item, width=token, type=TYPES[rows.dtype],
        scales=None if scales is None else scales.data_ptr(),
    )  # fmt: skip
