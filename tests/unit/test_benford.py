"""First digits: our DCT against libjpeg's own coefficients, our fit against scipy, our trees against scikit-learn."""

from __future__ import annotations

import io
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from counterfake.errors import CheckpointError, ConfigError, DataError
from counterfake.forensics import benford
from counterfake.forensics.benford import BenfordConfig
from counterfake.forensics.forest import BenfordForest, ForestConfig


def photo(seed: int = 0, side: int = 256, height: int | None = None, contrast: float = 1.2) -> np.ndarray:
    """(H, W, 3) uint8 with the 1/f spectrum of photographs and, like them, quiet and busy regions (contrast 0: none)."""
    rng, shape = np.random.default_rng(seed), (height or side, side)
    busy = np.exp(contrast * _noise(rng, shape, 1.8))
    stacked = np.stack([_noise(rng, shape, 1.2) * busy for _ in range(3)], axis=2)
    return np.clip(128 + 45 * stacked / stacked.std(), 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, shape: tuple[int, int], slope: float) -> np.ndarray:
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None]
    spectrum = np.maximum(np.hypot(fx, fy), 1 / max(shape)) ** -slope
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * spectrum, s=shape)
    return (field - field.mean()) / field.std()


# -- coefficients -----------------------------------------------------------------------------------------------------


def libjpeg_coefficients(data: bytes) -> np.ndarray:
    """Quantised coefficients (blocks, 64, natural order) of a baseline greyscale JPEG: a Huffman decoder of T.81."""
    tables: dict[int, dict[tuple[int, int], int]] = {}
    at, size = 2, (0, 0)
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xC0:
            size = (int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"))
        while marker == 0xC4 and body:
            counts, code, values = body[1:17], 0, iter(body[17:])
            table = tables.setdefault(body[0], {})
            for bits, count in enumerate(counts, 1):
                for _ in range(count):
                    table[bits, code] = next(values)
                    code += 1
                code <<= 1
            body = body[17 + sum(counts) :]
        if marker == 0xDA:
            break
    stream = np.unpackbits(np.frombuffer(data[at:-2].replace(b"\xff\x00", b"\xff"), np.uint8)).tolist()
    position = 0

    def symbol(table: dict[tuple[int, int], int]) -> int:
        nonlocal position
        code = 0
        for bits in range(1, 17):
            code = code * 2 + stream[position]
            position += 1
            if (bits, code) in table:
                return table[bits, code]
        raise AssertionError("no code")

    def value(bits: int) -> int:
        nonlocal position
        raw = int("".join(map(str, stream[position : position + bits])) or "0", 2)
        position += bits
        return raw if bits == 0 or raw >= 1 << (bits - 1) else raw - (1 << bits) + 1

    order = sorted(range(64), key=lambda i: (s := i // 8 + i % 8, i // 8 if s % 2 else i % 8))
    blocks = np.zeros((-(-size[0] // 8) * -(-size[1] // 8), 64), int)
    dc = 0
    for block in blocks:
        dc += value(symbol(tables[0x00]))
        block[0], k = dc, 1
        while k < 64:
            run, bits = divmod(symbol(tables[0x10]), 16)
            if (run, bits) == (0, 0):
                break
            k += run
            block[order[k]] = value(bits)
            k += 1
    return blocks


@pytest.mark.parametrize("quality", [30, 80, 85, 90, 95, 100])
def test_quantised_coefficients_are_those_of_libjpeg_within_one(quality: int) -> None:
    plane = benford.luma(photo(1, 88, 61))  # sides that are no multiple of 8
    out = io.BytesIO()
    Image.fromarray(plane).save(out, "JPEG", quality=quality)
    theirs = libjpeg_coefficients(out.getvalue())
    ours = benford.quantised(plane, quality, range(64))
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.08  # at quality 100 every rounding of the integer DCT shows


def test_quantisation_tables_are_those_of_libjpeg() -> None:
    for quality in (10, 50, 75, 92):
        out = io.BytesIO()
        Image.new("L", (8, 8)).save(out, "JPEG", quality=quality)
        theirs = np.array(Image.open(out).quantization[0]).reshape(8, 8)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(benford.quantisation_table(quality), theirs)


def test_coefficients_on_real_pictures_agree_with_libjpeg(shared_data) -> None:  # type: ignore[no-untyped-def]
    import tarfile

    with tarfile.open(shared_data / "stylegan_ffhq" / "images.tar.gz") as archive:
        members = (m for m in archive if m.name.endswith((".jpg", ".png")))
        for member, quality in zip(members, (80, 85, 90, 95, 100), strict=False):
            file = archive.extractfile(member)
            assert file is not None
            plane = benford.luma(np.asarray(Image.open(file).convert("RGB")))[:96, :96]
            out = io.BytesIO()
            Image.fromarray(plane).save(out, "JPEG", quality=quality)
            ours = benford.quantised(plane, quality, range(64))
            assert np.abs(ours - libjpeg_coefficients(out.getvalue())).max() <= 1


def test_luma_is_that_of_pillow() -> None:
    pixels = photo(2, 64)
    np.testing.assert_array_equal(benford.luma(pixels), np.asarray(Image.fromarray(pixels).convert("L")))


def test_first_digits_have_their_definition() -> None:
    magnitudes = np.arange(1, 1024)
    for base in (10, 20, 40, 60):
        expected = magnitudes // base ** np.floor(np.log(magnitudes) / np.log(base) + 1e-9).astype(int)
        np.testing.assert_array_equal(benford._digit_table(base)[1:].argmax(axis=1) + 1, expected)


# -- fit and divergences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [10, 60])
def test_the_fit_recovers_a_made_law(base: int) -> None:
    d = np.arange(1, base)
    true = np.array([[1.2, 0.4, 1.5], [0.8, -0.5, 0.7], [2.0, 3.0, 2.0]])
    laws = np.stack([k * np.log10(1 + 1 / (a + d**m)) / np.log10(base) for k, a, m in true])
    parameters, curves, failed = benford.fit(laws, base)
    np.testing.assert_allclose(parameters, true, rtol=1e-3)
    np.testing.assert_allclose(curves, laws, atol=1e-6)
    assert not failed.any()


@pytest.mark.parametrize("base", [10, 20, 40, 60])
def test_the_fit_is_as_good_as_scipys_on_pictures(base: int) -> None:
    from scipy.optimize import curve_fit

    counts = (benford._magnitudes(photo(3), BenfordConfig()) @ benford._digit_table(base)).reshape(
        -1, base - 1
    )
    histograms = counts[::4] / counts[::4].sum(axis=1, keepdims=True)
    d = np.arange(1, base)

    def law(x: np.ndarray, k: float, a: float, m: float) -> np.ndarray:
        return k * np.log10(1 + 1 / (a + x**m)) / np.log10(base)

    _, curves, failed = benford.fit(histograms, base)
    for histogram, curve, bad in zip(histograms, curves, failed, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = law(d, *curve_fit(law, d, histogram, maxfev=5000)[0])
            except RuntimeError:
                continue
        if np.isfinite(theirs).all() and not bad:
            assert np.linalg.norm(histogram - curve) <= np.linalg.norm(histogram - theirs) + 1e-4


def test_divergences_of_equal_curves_are_zero_and_kl_is_scipys() -> None:
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(9), size=3) for _ in range(2))
    np.testing.assert_allclose(benford._kl(p, p), 0, atol=1e-12)
    np.testing.assert_allclose(np.stack(benford._power_divergences(p, p)), 0, atol=1e-12)
    expected = [entropy(a, b, base=2) + entropy(b, a, base=2) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(benford._kl(p, q), expected, rtol=1e-3)


def test_renyi_and_tsallis_have_their_definition() -> None:
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.2, 0.3, 0.5]])
    forward, backward = (np.sum(a**0.3 * b**0.7) for a, b in ((p, q), (q, p)))
    renyi, tsallis = benford._power_divergences(p, q)
    assert renyi[0] == pytest.approx((np.log2(forward) + np.log2(backward)) / -0.7)
    assert tsallis[0] == pytest.approx((forward - 1) / -0.7 + (backward - 1) / -0.7)


def test_pictures_follow_the_law_better_than_shuffled_pixels() -> None:
    config = BenfordConfig(qualities=(95,), bases=(10,))
    picture = photo(5)
    shuffled = np.random.default_rng(0).permutation(picture.reshape(-1, 3)).reshape(picture.shape)
    kl = [np.median(benford.features(p, config)[:27:3]) for p in (picture, shuffled)]
    assert kl[0] < kl[1]


# -- features ---------------------------------------------------------------------------------------------------------


def test_there_are_540_divergences_and_a_failure_rate_per_base() -> None:
    config = BenfordConfig()
    names, row = config.names(), benford.features(photo(), config)
    assert len(names) == len(row) == len(set(names)) == 544
    assert sum(not n.startswith("failed") for n in names) == 540
    assert np.isfinite(row).all()
    one = benford.features(photo(), BenfordConfig(qualities=(90,), bases=(20,)))
    np.testing.assert_allclose(row[names.index("q90/b20/c1/kl")], one[0], rtol=1e-5)


def test_features_do_not_depend_on_batch_mates() -> None:
    pictures = [photo(i, 128 + 8 * i) for i in range(5)]
    together = benford.features_of(pictures, BenfordConfig())
    np.testing.assert_array_equal(together, [benford.features(p, BenfordConfig()) for p in pictures])


def test_both_orders_look_at_different_coefficients() -> None:
    a, b = (benford.features(photo(), BenfordConfig(order=o)) for o in ("true_zigzag", "paper_code"))  # type: ignore[arg-type]
    assert np.abs(a - b).max() > 0.01


def test_a_flat_picture_has_missing_features_not_nan() -> None:
    row = benford.features(np.full((128, 128, 3), 7, np.uint8), BenfordConfig())
    assert (row[:540] == benford.MISSING).all()
    assert (row[540:] == 1).all()


def test_large_pictures_are_cut_to_their_middle() -> None:
    config, picture = BenfordConfig(max_side=128), photo(0, 256)
    np.testing.assert_array_equal(
        benford.features(picture, config), benford.features(picture[64:192, 64:192], config)
    )


def test_too_small_pictures_and_wrong_settings_are_refused() -> None:
    with pytest.raises(DataError, match="too few blocks"):
        benford.features(photo(0, 32), BenfordConfig())
    with pytest.raises(ConfigError, match="bases"):
        BenfordConfig(bases=(2,))


def test_fifty_pictures_of_256_px_take_seconds_and_not_minutes_of_one_core() -> None:
    """1 to 2 s of a quiet core; a loop over coefficients takes minutes. The bound leaves a busy machine its slack."""
    pictures = [photo(i) for i in range(10)] * 5
    benford.features_of(pictures[:2], BenfordConfig())
    start = time.process_time()
    benford.features_of(pictures, BenfordConfig())
    assert time.process_time() - start < 20


# -- trees ------------------------------------------------------------------------------------------------------------


def rows(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    fake = rng.integers(0, 2, n)
    return (rng.normal(size=(n, 12)) + 0.7 * fake[:, None] * (np.arange(12) < 4)).astype(np.float32), fake


@pytest.mark.parametrize("kind", ["forest", "boosting"])
@pytest.mark.parametrize("balanced", [True, False])
def test_our_traversal_is_that_of_scikit_learn(
    kind: str, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from counterfake.forensics import forest

    kept: list = []
    grow = forest._grow
    monkeypatch.setattr(forest, "_grow", lambda config: kept.append(grow(config)) or kept[0])
    x, fake = rows()
    fitted = BenfordForest.fit(x, fake, ForestConfig(kind=kind, trees=20, balanced=balanced))  # type: ignore[arg-type]
    other, _ = rows(500, 1)
    again = BenfordForest.from_tensors(fitted.tensors())
    np.testing.assert_allclose(again.predict(other), kept[0].predict_proba(other)[:, 1], atol=1e-6)


def test_a_row_gets_the_same_answer_alone() -> None:
    x, fake = rows()
    fitted = BenfordForest.fit(x, fake, ForestConfig(trees=10))
    np.testing.assert_array_equal(fitted.predict(x), np.concatenate([fitted.predict(r[None]) for r in x]))


def test_the_seed_decides_the_forest() -> None:
    x, fake = rows()
    a, b, c = (BenfordForest.fit(x, fake, ForestConfig(trees=5, seed=s)).predict(x) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_arrays_that_are_no_forest_are_refused() -> None:
    x, fake = rows(60)
    good = BenfordForest.fit(x, fake, ForestConfig(trees=2)).tensors()
    for change in ({"left": good["left"] + 999}, {"value": good["value"][:3]}, {"shape": np.array([1])}):
        with pytest.raises(CheckpointError, match="no forest"):
            BenfordForest.from_tensors({**good, **change})
    with pytest.raises(DataError, match="12 features"):
        BenfordForest.from_tensors(good).predict(np.zeros((1, 3)))


def test_pictures_of_even_contrast_are_told_from_natural_ones() -> None:
    """The whole way: Gaussian coefficients follow the law less well than those of a mixture of quiet and busy regions."""
    config = BenfordConfig(qualities=(90, 100), bases=(10, 20))
    pictures = [photo(i, 128, contrast=1.2 * (i < 40)) for i in range(80)]
    x, labels = benford.features_of(pictures, config), np.repeat([0, 1], 40)
    fitted = BenfordForest.fit(x[::2], labels[::2], ForestConfig(trees=30))
    assert ((fitted.predict(x[1::2]) > 0.5) == labels[1::2]).mean() > 0.9
