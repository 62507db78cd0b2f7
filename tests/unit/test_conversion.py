"""conversion.py: swapped pictures and videos keep size, times, sound and everything but the face, and say what they are."""

from __future__ import annotations

import dataclasses
import itertools
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from counterfake import conversion, provenance, tracks, video
from counterfake.blending import Blending
from counterfake.conversion import ConversionConfig, Painter, Positions
from counterfake.errors import ConfigError, DataError, MediaError
from counterfake.faces import Face, moved
from counterfake.images import Preprocess
from counterfake.nets.swap import SwapConfig, SwapMaskConfig
from counterfake.nets.swap_family import SwapFamily
from counterfake.sources.synthetic import portrait
from counterfake.tracks import Sight, Track

CONFIG = ConversionConfig(label=False, detect_every=1)
RNG = np.random.default_rng(5)
SIZE = (160, 128)  # width, height of the films made here


class Here:
    """A detector that knows where the face is; frames of one colour have none."""

    method = "cascade"

    def detect(self, pixels: np.ndarray) -> list[Face]:
        if pixels.std() < 1:
            return []
        return [Face((45.0, 30.0, 60.0, 70.0), 1.0, [(62.0, 55.0), (88.0, 55.0)])]


def painter(
    config: SwapFamily | None = None, preprocess: Preprocess | None = None, who: str = "b"
) -> Painter:
    torch.manual_seed(0)
    config = config or dataclasses.replace(SwapConfig.tiny(), coverage=0.8)
    return Painter(config.build(), config, preprocess or Preprocess(size=40, crop="face", margin=1.4), who)


def picture(number: int = 0) -> np.ndarray:
    out = np.full((SIZE[1], SIZE[0], 3), 40 + number, np.uint8)
    out[10:122, 20:132] = portrait(0, 1, number, 112).pixels
    return out


def film(folder: Path, pictures: list[np.ndarray], **options: object) -> Path:
    path = folder / "film.mp4"
    video.write(path, pictures, crf=8, **options)
    return path


def convert(
    source: Path, config: ConversionConfig = CONFIG, made: Painter | None = None
) -> tuple[Path, conversion.Film]:
    target = source.with_name("out.mp4")
    followed = conversion.follow(source, Here(), config)
    return target, conversion.convert_video(made or painter(), followed, target, config, maker="swap@3")


# -- where a face goes ----------------------------------------------------------------------------------------------


def test_a_window_on_whole_pixels_is_the_crop_training_saw_and_the_place_its_inverse() -> None:
    one, box = painter(), (30.0, 20.0, 50.0, 50.0)  # 50 x 1.4 = 70 pixels, at (20, 10)
    move = conversion.window(Face(box, 1.0), picture(), one.preprocess)
    assert np.linalg.inv(np.vstack([move, [0, 0, 1]])) @ [[0, 40], [0, 40], [1, 1]] == pytest.approx(
        np.array([[20, 90], [10, 80], [1, 1]])
    )
    # 16 painted pixels over 0.8 x 70; the middle of the first reads half a pixel of 40 into them, as `centre` does
    assert one.place(move) == pytest.approx(
        np.array([[3.5, 0, 20 + 4.5 * 1.75 - 0.5], [0, 3.5, 10 + 4.5 * 1.75 - 0.5]])
    )


@pytest.mark.parametrize("crop", ["face", "aligned"])
def test_a_face_painted_as_it_was_read_is_put_back_where_it_was(
    crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is replaced by "give back the middle of the crop": the picture stays the same up to resampling."""
    y, x = np.mgrid[0:128, 0:160]
    ramp = np.stack([x * 1.5, y * 1.9, 255 - x * 1.5], axis=-1).round().astype(np.uint8)
    one = painter(preprocess=Preprocess(size=40, crop=crop, margin=1.4))
    tilted = Face((45.0, 30.0, 60.0, 60.0), 1.0, [(62.0, 55.0), (88.0, 60.0)])

    def echo(net: object, config: SwapFamily, rows: torch.Tensor, *_: object) -> tuple[torch.Tensor, None]:
        from counterfake.learners.warp import centre

        return centre(rows.float(), config.size, config.coverage).round().to(torch.uint8), None

    monkeypatch.setattr(conversion, "swap_with_mask", echo)
    (made,) = one.convert([(ramp, [tilted])], Blending(colour="none"))
    assert (made != ramp).any()
    assert (
        np.abs(made.astype(int) - ramp).max() <= 3
    )  # a pixel of displacement is 1.5 to 2 a step, on each side


def test_frames_between_two_searches_are_interpolated_and_far_ones_have_no_face() -> None:
    sights = tuple(
        Sight(i, Face((float(i), 0.0, 10.0, 10.0), 1.0, [(float(i), 1.0), (5.0, 1.0)]), True)
        for i in (4, 8, 12)
    )
    where = Positions(Track(0, sights), 4)
    assert [face.box[0] if (face := where.at(i)) else None for i in (0, 1, 4, 6, 9, 12, 15, 16)] == [
        None, 4, 4, 6, 9, 12, 12, None,
    ]  # fmt: skip
    assert (where.at(6) or sights[0].face).landmarks == [(6.0, 1.0), (5.0, 1.0)]


# -- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", ["alpha", "poisson"])
@pytest.mark.parametrize("colour", ["reinhard", "histogram", "none"])
def test_a_picture_changes_in_the_face_only(blend: str, colour: str) -> None:
    before = picture()
    config = dataclasses.replace(CONFIG, blending=Blending(blend=blend, colour=colour, erode=0.03, blur=0.02))
    made = conversion.convert_picture(painter(), before, Here(), config)
    changed = (made.pixels != before).any(axis=2)
    assert changed[50:90, 60:90].mean() > 0.9
    assert not changed[:8].any()
    assert not changed[:, :20].any()
    assert made.faces[0].box == (45.0, 30.0, 60.0, 70.0)


def test_a_picture_without_a_face_is_refused() -> None:
    with pytest.raises(DataError, match="no face was found"):
        conversion.convert_picture(painter(), np.full((64, 64, 3), 90, np.uint8), Here(), CONFIG)


def test_the_networks_own_mask_is_used_where_it_has_one() -> None:
    config = dataclasses.replace(SwapMaskConfig.tiny(), coverage=0.8)
    one = painter(config)
    with torch.no_grad():
        for decoder in [m for name, m in one.net.named_modules() if name.endswith("paint")]:
            decoder.bias[0] = -1e4  # α is 0 everywhere
    made = conversion.convert_picture(one, picture(), Here(), CONFIG)
    assert (made.pixels == picture()).all()


def test_any_size_of_crop_and_network_fits_any_picture() -> None:
    for size, side in ((16, 24), (32, 200)):
        config = dataclasses.replace(SwapConfig.tiny(), size=size)
        one = painter(config, Preprocess(size=side, crop="face"))
        assert conversion.convert_picture(one, picture(), Here(), CONFIG).pixels.shape == picture().shape


def test_strangers_and_models_of_whole_pictures_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="does not know 'c'; it knows a, b"):
        painter(who="c")
    with pytest.raises(ConfigError, match=r"preprocess\.crop=none"):
        painter(preprocess=Preprocess(size=40))


# -- videos ---------------------------------------------------------------------------------------------------------


def test_a_film_keeps_size_times_and_sound_and_is_marked_and_labelled(tmp_path: Path) -> None:
    source = film(tmp_path, [picture(i % 3) for i in range(12)], audio_from=sound(tmp_path))
    target, made = convert(source, ConversionConfig(detect_every=3, batch=5))
    before, after = list(video.frames(source, every=1)), list(video.frames(target, every=1))
    assert (made.frames, made.swapped, made.damaged, made.audio, made.faces) == (12, 12, 0, True, 1)
    assert [f.time_s for f in after] == pytest.approx([f.time_s for f in before], abs=1e-4)
    assert video.probe(target).audio == video.probe(source).audio
    claims = provenance.read_video(target)
    assert (claims.digital_source_type, claims.maker) == ("compositeWithTrainedAlgorithmicMedia", "swap@3")
    left, _, right, bottom = provenance.label_box(SIZE)
    assert (
        np.median(after[0].pixels[bottom - 6 : bottom, :20]) < 20
    )  # of the plain ground of 40, a third is left
    assert right - left > 60
    face = np.abs(after[3].pixels.astype(int) - before[3].pixels)[50:90, 60:90]
    assert face.mean() > 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.mp4", "out.mp4", "tone.mp4"]


def test_a_silent_film_of_variable_rate_keeps_its_times(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.2, 0.24, 0.5]
    source = film(tmp_path, [video.Frame(picture(), i, t) for i, t in enumerate(times)])
    assert video.probe(source).variable_rate
    target, made = convert(source)
    assert [f.time_s for f in video.frames(target, every=1)] == pytest.approx(times, abs=1e-3)
    assert not made.audio


def test_frames_without_the_face_stay_as_they_were(tmp_path: Path) -> None:
    blank = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)
    source = film(tmp_path, [picture()] * 6 + [blank] * 12)
    target, made = convert(source)
    assert 6 <= made.swapped < 12
    last = list(video.frames(target, every=1))[-1].pixels
    assert np.abs(last.astype(int) - 90).max() <= 2


def test_a_film_without_any_face_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = film(tmp_path, [np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)] * 5)
    with pytest.raises(DataError, match=r"no face was found by cascade in 5 frames; nothing was written"):
        convert(source)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_a_corrupt_frame_is_left_out_and_counted(tmp_path: Path) -> None:
    source = film(tmp_path, [picture(i % 4) for i in range(10)])
    data, packets = source.read_bytes(), _packets(source)
    at, size = packets[5]
    source.write_bytes(data[: at + 4] + bytes(255 - b for b in data[at + 4 : at + size]) + data[at + size :])
    target, made = convert(source)
    assert made.damaged >= 1
    assert made.frames == 10 - made.damaged
    assert len(list(video.frames(target, every=1))) == made.frames


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(MediaError):
        conversion.follow(tmp_path / "film.mp4", Here(), CONFIG)


def test_an_error_half_way_leaves_no_file(tmp_path: Path) -> None:
    source = film(tmp_path, [picture()] * 6)
    followed = conversion.follow(source, Here(), CONFIG)
    calls = itertools.count()

    def stop(_: int) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.convert_video(painter(), followed, tmp_path / "out.mp4", CONFIG, maker="m", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_memory_does_not_grow_with_the_length_of_the_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames come from a generator that counts how many of them are alive."""
    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self) -> None:
            if self.base is None or not isinstance(self.base, Counted):
                alive[0] -= 1

    def frames(count: int) -> Iterator[video.Frame]:
        for i in range(count):
            pixels = picture().view(Counted)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield video.Frame(pixels, i, i / 25)

    track = Track(0, tuple(Sight(i, Here().detect(picture())[0], True) for i in range(60)))
    followed = conversion.Followed(
        tmp_path, video.probe(film(tmp_path, [picture()] * 2)), [Positions(track, 1)]
    )
    tally = conversion._Tally(Preprocess(size=40, crop="face"))
    for _ in conversion._converted(
        frames(60), painter(), followed, dataclasses.replace(CONFIG, batch=4), tally
    ):
        pass
    assert most[0] <= 4 * 3
    assert tally.swapped == 60


def test_smoothing_a_long_film_by_parts_gives_what_smoothing_it_at_once_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = np.arange(100.0)
    values = RNG.normal(size=(100, 4)).cumsum(axis=0)
    whole = tracks._steady(at, values, at, 3.0)
    monkeypatch.setattr(tracks, "STEADY_ROWS", 7)
    assert tracks._steady(at, values, at, 3.0) == pytest.approx(whole, abs=1e-12)


def test_a_cut_of_a_moving_face_is_steady_to_a_fraction_of_a_pixel() -> None:
    """A picture that moves by 0.3 pixels a frame, its box with it: the windows show the same, where whole pixels jump."""
    _, x = np.mgrid[0:128, 0:160].astype(np.float64)
    one = painter()
    cuts = []
    for step in range(8):
        pixels = (127 + 90 * np.sin((x - 0.3 * step) / 4)).astype(np.uint8)[:, :, None].repeat(3, axis=2)
        face = Face((45 + 0.3 * step, 30.0, 60.0, 60.0), 1.0)
        cuts.append(moved(pixels, conversion.window(face, pixels, one.preprocess), 40).astype(int))
    assert (
        max(np.abs(a - b).mean() for a, b in itertools.pairwise(cuts)) < 2.5
    )  # rounding the window gives 7.9


def sound(folder: Path) -> Path:
    """One second of a tone in an MP4."""
    import av

    path, plain = folder / "tone.mp4", folder / "tone.wav"
    with wave.open(str(plain), "wb") as out:
        out.setparams((1, 2, 8000, 8000, "NONE", ""))
        out.writeframes((3000 * np.sin(np.arange(8000) / 3)).astype("<i2").tobytes())
    with av.open(str(plain)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream("aac", rate=8000)
        for frame in given.decode(audio=0):
            frame.pts = None
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    plain.unlink()
    return path


def _packets(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of each video packet."""
    import av

    with av.open(str(path)) as given:
        return [(p.pos, p.size) for p in given.demux(video=0) if p.size and p.pos is not None]
