"""Residual codecs against a version that codes one row and one dimension at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.errors import UserError
from ckd_ray.store.codec import (
    CODEC_FILE,
    RESIDUAL_BITS,
    BrokenCodecError,
    Float16,
    Residual,
    bytes_per_token,
    load_codec,
    save_codec,
)
from ckd_ray.store.codec_training import choose_centroids, group_centroids, sample_size, train_codec

DIM = 16


def unit_rows(count: int, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Rows of unit norm around 12 directions, as token embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(12, dim, generator=generator)
    rows = topics[torch.randint(12, (count,), generator=generator)] + 0.3 * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def literal_encode(codec: Residual, row: list[float]) -> bytes:
    centroids = codec.centroids_KD.float().tolist()
    products = [sum(a * b for a, b in zip(row, centroid, strict=True)) for centroid in centroids]
    nearest = products.index(max(products))
    out = [nearest & 255, nearest >> 8 & 255, nearest >> 16 & 255, nearest >> 24]
    per_byte = 8 // codec.bits
    for start in range(0, len(row), per_byte):
        byte = 0
        for place in range(per_byte):
            rest = np.float32(row[start + place]) - np.float32(centroids[nearest][start + place])
            bucket = sum(1 for cutoff in codec.cutoffs.tolist() if rest > cutoff)
            byte += bucket * 2 ** (place * codec.bits)
        out.append(byte)
    return bytes(out)


def literal_decode(codec: Residual, code: bytes) -> list[float]:
    centroid = codec.centroids_KD[int.from_bytes(code[:4], "little")].tolist()
    values = []
    for d, start in enumerate(centroid):
        byte, place = divmod(d * codec.bits, 8)
        bucket = code[4 + byte] // 2**place % 2**codec.bits
        values.append(start + float(codec.weights[bucket]))
    norm = sum(v * v for v in values) ** 0.5
    return [v / norm for v in values]


@pytest.fixture(scope="module", params=sorted(RESIDUAL_BITS))
def codec(request: pytest.FixtureRequest) -> Residual:
    return train_codec(request.param, unit_rows(900), 20)


def test_codes_are_the_literal_ones(codec: Residual) -> None:
    rows = unit_rows(60, seed=1)
    codes = codec.encode(rows)
    assert codes.shape == (60, codec.bytes_per_token) and codec.bytes_per_token == 4 + DIM * codec.bits // 8
    assert [c.tobytes() for c in codes] == [literal_encode(codec, row) for row in rows.tolist()]
    decoded = codec.decode(codes)
    assert decoded.dtype == torch.float16
    wanted = torch.tensor([literal_decode(codec, c.tobytes()) for c in codes])
    assert torch.allclose(decoded.float(), wanted, atol=1e-3)
    assert torch.allclose(decoded.float().norm(dim=1), torch.ones(60), atol=2e-3)


def test_every_byte_is_decoded_as_written() -> None:
    """Hand-computed: one centroid at 0, so that only buckets speak; 2 bits, the first dimension in the lowest bits."""
    codec = Residual("residual2", torch.zeros(1, 4), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, -0.5, 0.5, 2]))
    codes = codec.encode(torch.tensor([[-3.0, -0.1, 0.1, 3.0]]))
    assert codes.tolist() == [[0, 0, 0, 0, 0b11_10_01_00]]
    norm = (2 * (4 + 0.25)) ** 0.5
    assert torch.allclose(codec.decode(codes).float() * norm, torch.tensor([[-2.0, -0.5, 0.5, 2.0]]), atol=5e-3)


def test_bytes_a_token() -> None:
    assert [bytes_per_token(name, 128) for name in ("fp16", "residual1", "residual2", "residual4")] == [256, 20, 36, 68]
    assert Residual("residual2", torch.randn(2, 128), torch.zeros(3), torch.zeros(4)).bytes_per_token == 36


def test_no_rows(codec: Residual) -> None:
    codes = codec.encode(torch.empty(0, DIM))
    assert codes.shape == (0, codec.bytes_per_token)
    assert codec.decode(codes).shape == (0, DIM)


def test_a_code_does_not_depend_on_the_batch(codec: Residual) -> None:
    rows = unit_rows(700, seed=2)
    whole = codec.encode(rows)
    assert np.array_equal(whole, codec.encode(rows))
    for size in (1, 3, 64, 333):
        assert np.array_equal(whole, np.concatenate([codec.encode(part) for part in rows.split(size)])), size
    assert np.array_equal(whole, codec.encode(rows.double())) and np.array_equal(
        codec.encode(rows.half()), codec.encode(rows.half().float())
    )


def test_more_bits_less_error() -> None:
    rows = unit_rows(2000)
    errors = []
    for name in ("residual1", "residual2", "residual4"):
        codec = train_codec(name, rows, 20)
        errors.append(float((codec.decode(codec.encode(rows)).float() - rows).square().sum(1).mean()))
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    # Against the centroid alone: what is left over is what the bits are for.
    nearest = codec.centroids_KD[codec.nearest_centroids(rows)].float()
    assert errors[0] < 0.6 * float((nearest - rows).square().sum(1).mean())


def test_training_repeats_itself() -> None:
    a, b = (train_codec("residual2", unit_rows(500), 16, seed=3) for _ in range(2))
    assert torch.equal(a.centroids_KD, b.centroids_KD) and torch.equal(a.weights, b.weights)
    other = train_codec("residual2", unit_rows(500), 16, seed=4)
    assert not torch.equal(a.centroids_KD, other.centroids_KD)
    assert train_codec("residual2", unit_rows(5), 16).num_centroids == 5
    with pytest.raises(ValueError, match="no rows"):
        train_codec("residual2", torch.empty(0, DIM), 4)


def test_groups_find_the_nearest_of_many_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups near: the exact answer. Few near: a row gets the best of these, which costs little."""
    monkeypatch.setattr("ckd_ray.store.codec_training._LEAST_GROUPED", 64)
    rows = unit_rows(3000)
    centroids = torch.nn.functional.normalize(unit_rows(256, seed=5) + 0.2 * torch.randn(256, DIM), dim=1)
    exact_products = rows @ centroids.half().float().T
    found = {}
    for near in (16, 3):
        monkeypatch.setattr("ckd_ray.store.codec_training._NEAR_GROUPS", near)
        ordered, groups = group_centroids(centroids, seed=1)
        assert len(groups.centers_GD) == 16 and int(groups.bounds[-1]) == 256
        assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, centroids.tolist()))
        codec = Residual("residual1", ordered, torch.zeros(1), torch.tensor([-0.1, 0.1]), groups=groups)
        products = rows @ codec.centroids_KD.float().T
        found[near] = products.gather(1, codec.nearest_centroids(rows)[:, None])[:, 0]
        assert np.array_equal(
            codec.encode(rows), np.concatenate([codec.encode(part) for part in rows.split(97)])
        )  # groups do not bring the batch in either
    best = exact_products.max(1).values
    assert torch.allclose(found[16], best, atol=1e-6)
    bounds = groups.bounds.tolist()
    for row, group, product in zip(rows[:50], (rows @ groups.centers_GD.T).argmax(1).tolist(), found[3], strict=False):
        near_centers = (groups.centers_GD @ groups.centers_GD[group]).argsort(descending=True)[:3].tolist()
        candidates = [k for g in near_centers for k in range(bounds[g], bounds[g + 1])]
        assert float(product) == pytest.approx(max(float(row @ codec.centroids_KD[k].float()) for k in candidates))


def test_a_saved_codec_codes_the_same(tmp_path: Path, codec: Residual) -> None:
    digest = save_codec(codec, str(tmp_path))
    assert digest == hashlib.sha256((tmp_path / CODEC_FILE).read_bytes()).hexdigest()
    loaded = load_codec(codec.name, DIM, str(tmp_path), digest)
    rows = unit_rows(50, seed=9)
    assert np.array_equal(loaded.encode(rows), codec.encode(rows)) and loaded.digest == digest
    assert torch.equal(loaded.decode(loaded.encode(rows)), codec.decode(codec.encode(rows)))


def test_another_learned_part_is_refused(tmp_path: Path, codec: Residual) -> None:
    digest = save_codec(codec, str(tmp_path))
    path = tmp_path / CODEC_FILE
    data = bytearray(path.read_bytes())
    with pytest.raises(BrokenCodecError, match=f"{path}: not what the shards"):
        load_codec(codec.name, DIM, str(tmp_path), "0" * 64)
    with pytest.raises(BrokenCodecError, match=r"has 16 dimensions, the shards have 32"):
        load_codec(codec.name, 2 * DIM, str(tmp_path), digest)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenCodecError, match="not what the shards"):
        load_codec(codec.name, DIM, str(tmp_path), digest)
    path.unlink()
    with pytest.raises(BrokenCodecError, match="missing"):
        load_codec(codec.name, DIM, str(tmp_path), digest)


@pytest.mark.parametrize(("name", "dim", "multiple"), [("residual1", 12, 8), ("residual2", 6, 4), ("residual4", 7, 2)])
def test_dimensions_that_do_not_fill_bytes(name: str, dim: int, multiple: int) -> None:
    with pytest.raises(UserError, match=f"(?s)model.dim.*multiple of {multiple}"):
        train_codec(name, unit_rows(20, dim), 2)
    with pytest.raises(UserError, match=f"(?s)model.dim.*multiple of {multiple} for embed.codec {name}"):
        load_config(None, [f"embed.codec={name}", f"model.dim={dim}"])


def test_an_unknown_codec() -> None:
    with pytest.raises(UserError, match=r"(?s)embed.codec.*fp16, residual1"):
        load_codec("residual3", 16)


def test_half_floats_are_a_view() -> None:
    codec = Float16(4)
    codes = codec.encode(torch.arange(8.0).view(2, 4))
    assert codes.shape == (2, 8) and codec.decode(codes).data_ptr() == codes.ctypes.data
    assert torch.equal(codec.decode(codes), torch.arange(8.0).view(2, 4).half())


def test_sizes_of_samples_are_bounded() -> None:
    """Centroids: a power of two, never more than 2^17, never fewer than 40 sampled rows each."""
    assert choose_centroids(0) == choose_centroids(79) == 1
    assert choose_centroids(17_000 * 100) == 8192 and choose_centroids(600_000_000) == 131_072
    for tokens in (10, 5_000, 10**6, 10**8, 10**10):
        assert choose_centroids(tokens) * 40 <= max(40, sample_size(tokens)) <= 2**23
        assert sample_size(tokens) <= tokens
