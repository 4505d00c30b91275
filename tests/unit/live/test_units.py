"""Units and stretches: what the model is shown of sound and frames as they come in."""

import gc
import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Piece
from vllm_mm_ext.live.prompt import Stretch, Unit
from vllm_mm_ext.live.units import UnitCutter
from vllm_mm_ext.live.watching import Sight
from vllm_mm_ext.media.types import SizeRule

RATE = 1000
FAMILY = FamilyTraits(
    hears=True,
    sees=True,
    images=True,
    audio_rate=RATE,
    unit_s=2.0,
    frame_multiple=2,
    fps=1.0,
    size_rule=SizeRule(),
    turn_end=False,
)


def sight(level: int, time_s: float | None = None, size: int = 4) -> Sight:
    pixels = np.full((size, size, 3), level % 256, np.uint8)
    return Sight(pixels, np.full((32, 32), level % 256, np.uint8), time_s)


@dataclass
class Client:
    """Sends sound and frames to a cutter; samples are their own numbers, frames grow brighter."""

    cutter: UnitCutter
    now: float = 0.0
    sent: int = 0
    shown: int = 0

    def sound(self, seconds: float, step: float = 0.1) -> bool:
        grown = False
        for _ in range(round(seconds / step)):
            count = round(step * RATE)
            samples = np.arange(self.sent, self.sent + count, dtype=np.float32)
            piece = Piece(self.sent, samples, None)
            self.sent += count
            self.now += step
            grown |= self.cutter.hear(piece, self.sent, self.now)
        return grown

    def frame(self, time_s: float | None = None, size: int = 4) -> bool:
        self.shown += 1
        return self.cutter.see(sight(self.shown * 20, time_s, size), self.now)

    def both(self, seconds: int) -> None:
        for _ in range(seconds):
            self.sound(0.5)
            self.frame()
            self.sound(0.5)


@pytest.fixture
def client() -> Client:
    return Client(UnitCutter(FAMILY, 0.0))


def sound_of(stretches: Iterable[Stretch]) -> npt.NDArray[np.float32]:
    units = [unit.samples for stretch in stretches for unit in stretch.units]
    return np.concatenate([np.zeros(0, np.float32), *units])


def shape_of(stretches: Sequence[Stretch]) -> list[list[tuple[float, int]]]:
    """Seconds of sound and number of different frames, unit by unit."""
    return [
        [
            (len(unit.samples) / RATE, len({frame.time_s for frame in unit.frames}))
            for unit in stretch.units
        ]
        for stretch in stretches
    ]


def check(stretches: Sequence[Stretch]) -> None:
    """What holds of all media, whatever came in."""
    names = [stretch.stretch_id for stretch in stretches]
    assert len(set(names)) == len(names)
    for stretch in stretches:
        check_units(stretch.units)


def check_units(units: tuple[Unit, ...]) -> None:
    assert units
    assert len({bool(unit.frames) for unit in units}) == 1
    assert len({bool(len(unit.samples)) for unit in units[:-1]}) <= 1
    assert len({frame.pixels.shape for unit in units for frame in unit.frames}) <= 1
    for number, unit in enumerate(units):
        assert len(unit.samples) <= FAMILY.unit_samples
        if unit is not units[-1]:
            assert len(unit.samples) in (0, FAMILY.unit_samples)
        start_s = number * FAMILY.unit_s
        end_s = start_s + (len(unit.samples) / RATE or FAMILY.unit_s)
        assert len(unit.frames) % FAMILY.frame_multiple == 0
        assert len(unit.frames) <= FAMILY.unit_frames
        times = [frame.time_s for frame in unit.frames]
        assert times == sorted(times)
        assert all(start_s <= t < end_s for t in times)
    assert sum(len(unit.samples) for unit in units) <= 60 * RATE


def test_a_unit_is_complete_as_soon_as_its_sound_is_there(client: Client) -> None:
    assert not client.sound(1.9)
    assert client.cutter.stretches() == ()
    assert client.sound(0.1)
    assert shape_of(client.cutter.stretches()) == [[(2, 0)]]
    client.sound(2.5)
    assert shape_of(client.cutter.stretches()) == [[(2, 0), (2, 0)]]
    assert client.cutter.sound_samples == 4500
    committed = client.cutter.commit()
    assert shape_of(committed) == [[(2, 0), (2, 0), (0.5, 0)]]
    np.testing.assert_array_equal(sound_of(committed), np.arange(4500))
    assert client.cutter.stretches() == client.cutter.commit() == ()
    assert client.cutter.nbytes == client.cutter.sound_samples == client.cutter.frames == 0


def test_frames_lie_at_their_times_in_units_of_sound(client: Client) -> None:
    client.both(5)
    (stretch,) = client.cutter.commit()
    times = [[frame.time_s for frame in unit.frames] for unit in stretch.units]
    assert times == [
        pytest.approx([0.5, 1.5]),
        pytest.approx([2.5, 3.5]),
        pytest.approx([4.5, 4.5]),
    ]
    check([stretch])


@pytest.mark.parametrize("whole", [0, 1])
def test_a_frame_beside_a_single_sample_lies_within_its_unit(whole: int) -> None:
    rate = 16_000
    cutter = UnitCutter(replace(FAMILY, audio_rate=rate), 0.0)
    count = whole * round(FAMILY.unit_s * rate) + 1
    cutter.see(sight(20, whole * FAMILY.unit_s), whole * FAMILY.unit_s)
    cutter.hear(Piece(0, np.zeros(count, np.float32), None), count, count / rate)
    (stretch,) = cutter.commit()
    (unit,) = (unit for unit in stretch.units if len(unit.samples) == 1)
    assert unit.frames
    assert all(whole * FAMILY.unit_s <= frame.time_s for frame in unit.frames)


def test_frames_alone_are_complete_by_the_next_frame_or_by_the_clock(client: Client) -> None:
    client.frame()
    assert client.cutter.deadline() == pytest.approx(2.0)
    client.now = 1.0
    client.frame()
    assert not client.cutter.pass_time(1.9)
    assert client.cutter.pass_time(2.0)
    assert client.cutter.deadline() is None
    client.now = 2.5
    assert not client.frame()
    client.now = 4.0
    assert client.frame()
    assert shape_of(client.cutter.stretches()) == [[(0, 2), (0, 1)]]
    check(client.cutter.commit())


def test_a_stretch_ends_where_frames_begin_or_end_at_the_border_of_a_unit(client: Client) -> None:
    client.sound(2.5)
    client.frame()
    client.sound(3.5)
    client.both(2)
    client.sound(16)
    stretches = client.cutter.commit()
    check(stretches)
    # The last frame is shown again for ten seconds.
    assert shape_of(stretches) == [[(2, 0)], [(2, 1)] * 2 + [(2, 2)] + [(2, 1)] * 5, [(2, 0)] * 3]
    np.testing.assert_array_equal(sound_of(stretches), np.arange(client.sent))


def test_frames_that_come_before_the_sound_go_with_it(client: Client) -> None:
    client.frame()
    client.now += 0.3
    client.both(2)
    (stretch,) = client.cutter.commit()
    check([stretch])
    assert shape_of([stretch]) == [[(2, 2)]]


def test_a_frame_right_after_a_commit_goes_with_the_sound_that_follows(client: Client) -> None:
    client.both(2)
    client.cutter.commit()
    client.frame()
    client.sound(2.0)
    assert shape_of(client.cutter.stretches()) == [[(2, 1)]]


def test_when_sound_ends_frames_go_on_alone_and_it_can_come_back(client: Client) -> None:
    client.both(3)
    for _ in range(6):
        client.now += 1
        client.frame()
    client.both(2)
    stretches = client.cutter.commit()
    check(stretches)
    np.testing.assert_array_equal(sound_of(stretches), np.arange(client.sent))
    assert [bool(len(stretch.units[0].samples)) for stretch in stretches] == [True, False, True]


def test_a_stretch_ends_after_a_minute(client: Client) -> None:
    client.both(125)
    stretches = client.cutter.commit()
    check(stretches)
    assert [len(stretch.units) for stretch in stretches] == [30, 30, 3]


def test_a_camera_that_turns_begins_a_stretch(client: Client) -> None:
    client.both(4)
    client.sound(0.5)
    client.frame(size=6)
    client.sound(1.5)
    client.sound(2.0)
    stretches = client.cutter.commit()
    check(stretches)
    assert [len(stretch.units) for stretch in stretches] == [2, 2]


def test_many_frames_a_second_become_as_many_as_the_model_is_shown(client: Client) -> None:
    for _ in range(61):
        client.frame()
        client.sound(0.1)
        assert client.cutter.nbytes <= client.sent * 4 + 10 * 4 * 4 * 3
    (stretch,) = client.cutter.commit()
    check([stretch])
    assert shape_of([stretch]) == [[(2, 2), (2, 2), (2, 2), (0.1, 1)]]


def test_outside_speech_only_the_padding_is_kept(client: Client) -> None:
    client.cutter.gate(300)
    client.sound(60)
    assert client.cutter.stretches() == ()
    assert client.cutter.nbytes <= (300 + 200 + 100) * 4
    client.cutter.begin_speech(client.sent - 300)
    client.sound(1.0)
    client.cutter.end_speech(client.sent - 200)
    committed = client.cutter.commit()
    np.testing.assert_array_equal(sound_of(committed), np.arange(59_700, 60_800))
    # What came after the end is the padding of the next speech.
    client.cutter.begin_speech(client.sent - 500)
    client.cutter.end_speech(client.sent)
    np.testing.assert_array_equal(sound_of(client.cutter.commit()), np.arange(60_800, 61_000))


def test_frames_between_turns_are_a_stretch_of_the_next_message(client: Client) -> None:
    client.cutter.gate(300)
    client.both(4)
    assert shape_of(client.cutter.stretches()) == [[(0, 2)]]
    client.cutter.begin_speech(client.sent - 100)
    client.both(2)
    client.cutter.end_speech(client.sent)
    stretches = client.cutter.commit()
    check(stretches)
    assert shape_of(stretches) == [[(0, 2)], [(2, 2), (0.1, 1)]]


def test_a_previewed_end_is_what_the_commit_returns(client: Client) -> None:
    client.cutter.gate(300)
    client.sound(1.0)
    client.cutter.begin_speech(client.sent)
    client.both(3)
    cut = client.sent - 100
    previewed = client.cutter.preview(cut)
    client.both(3)
    assert client.cutter.preview(cut) is previewed
    client.cutter.end_speech(cut)
    committed = client.cutter.commit()
    assert committed is previewed
    check(committed)
    np.testing.assert_array_equal(sound_of(committed), np.arange(1000, cut))
    assert client.cutter.frames == 3
    assert shape_of(client.cutter.commit()) == [[(0, 2), (0, 1)]]


def test_a_frame_that_came_after_all_sound_is_in_the_message_that_ends_there(
    client: Client,
) -> None:
    client.cutter.gate(300)
    client.sound(1.0)
    client.cutter.begin_speech(client.sent)
    client.sound(1.0)
    client.now += 0.05
    client.frame()
    client.cutter.end_speech(client.sent)
    assert shape_of(client.cutter.commit()) == [[(1, 1)]]


def test_after_a_resume_a_preview_has_changed_nothing(client: Client) -> None:
    other = Client(UnitCutter(FAMILY, 0.0))
    for one in (client, other):
        one.both(3)
        if one is client:
            one.cutter.preview(one.sent - 300)
        one.sound(0.5)
        one.frame()
        one.sound(2.5)
        if one is client:
            assert one.cutter.resume()
            assert not one.cutter.resume()
        one.both(2)
    assert client.cutter.sound_samples == other.cutter.sound_samples
    for mine, theirs in zip(client.cutter.commit(), other.cutter.commit(), strict=True):
        for unit, expected in zip(mine.units, theirs.units, strict=True):
            np.testing.assert_array_equal(unit.samples, expected.samples)
            assert [f.time_s for f in unit.frames] == [f.time_s for f in expected.frames]


def test_frames_do_not_wait_for_a_microphone_that_was_muted_in_a_pause(client: Client) -> None:
    client.cutter.gate(300)
    client.both(1)
    client.cutter.begin_speech(client.sent - 100)
    client.both(3)
    cut = client.sent - 100
    client.cutter.preview(cut)
    for _ in range(60):
        client.now += 1
        client.frame()
    stretches = client.cutter.stretches()
    check(stretches)
    assert len(stretches[-1].units) >= 27
    client.cutter.end_speech(cut)
    committed = client.cutter.commit()
    check(committed)
    np.testing.assert_array_equal(sound_of(committed), np.arange(900, client.sent))


def test_old_stretches_can_be_dropped_and_a_long_one_split(client: Client) -> None:
    client.both(6)
    client.cutter.split()
    client.both(3)
    before = client.cutter.nbytes
    assert shape_of(client.cutter.stretches()) == [[(2, 2)] * 3, [(2, 2)]]
    client.cutter.drop_first(1)
    assert client.cutter.nbytes == before - 3 * (2000 * 4 + 2 * 48)
    check(client.cutter.stretches())
    assert shape_of(client.cutter.commit()) == [[(2, 2), (1, 1)]]


def test_what_is_dropped_in_a_pause_is_not_committed(client: Client) -> None:
    client.cutter.gate(300)
    client.sound(0.5)
    client.cutter.begin_speech(client.sent)
    client.both(6)
    client.cutter.split()
    client.both(3)
    client.cutter.preview(client.sent - 100)
    client.cutter.drop_first(1)
    expected = [[(2, 2), (0.9, 1)]]
    assert shape_of(client.cutter.preview(client.sent - 100)) == expected
    client.cutter.end_speech(client.sent - 100)
    assert shape_of(client.cutter.commit()) == expected


def test_a_clear_drops_what_was_heard_and_seen(client: Client) -> None:
    client.cutter.gate(300)
    client.both(3)
    client.cutter.begin_speech(client.sent - 200)
    client.both(3)
    client.cutter.preview(client.sent - 100)
    client.sound(0.5)
    client.cutter.clear()
    assert client.cutter.nbytes == client.cutter.sound_samples == client.cutter.frames == 0
    client.sound(1.0)
    assert client.cutter.commit() == ()


def test_a_camera_may_begin_its_clock_anew_after_a_clear(client: Client) -> None:
    for seconds in (20, 4):
        client.cutter.clear()
        for second in range(seconds):
            client.sound(0.5)
            client.frame(float(second))
            client.sound(0.5)
    assert shape_of(client.cutter.commit()) == [[(2.0, 2), (2.0, 2)]]


def test_a_session_that_is_dropped_leaves_nothing_behind(client: Client) -> None:
    client.both(5)
    pixels = weakref.ref(client.cutter.stretches()[0].units[0].frames[0].pixels)
    gc.disable()
    try:
        del client.cutter
        assert pixels() is None
    finally:
        gc.enable()


Step = tuple[str, int]


@settings(max_examples=100)
@given(
    gated=st.booleans(),
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["sound"] * 6
                + ["frame"] * 4
                + ["timed frame", "big frame", "wait", "begin", "end", "preview", "resume"]
                + ["commit", "split", "drop", "gate", "ungate", "clear", "tick"]
            ),
            st.integers(1, 4000),
        ),
        max_size=80,
    ),
)
def test_whatever_comes_in_units_are_whole_and_sound_is_in_order(
    gated: bool, steps: list[Step]
) -> None:
    client = Client(UnitCutter(FAMILY, 0.0))
    cutter = client.cutter
    if gated:
        cutter.gate(300)
    messages: list[tuple[Stretch, ...]] = []
    speaks = False
    for kind, amount in steps:
        known = [unit for stretch in cutter.stretches() for unit in stretch.units]
        dropped = kind in ("drop", "commit", "clear")
        if kind == "sound":
            client.sound(amount / RATE, amount / RATE)
        elif kind == "frame":
            client.frame()
        elif kind == "timed frame":
            client.frame(client.now + amount / RATE - 2)
        elif kind == "big frame":
            client.frame(size=8)
        elif kind == "wait":
            client.now += amount / RATE
        elif kind == "tick":
            deadline = cutter.deadline()
            if deadline is not None:
                client.now = max(client.now, deadline)
                assert cutter.pass_time(client.now)
        elif kind == "begin":
            speaks = True
            cutter.resume()
            cutter.begin_speech(max(0, client.sent - amount))
        elif kind in ("end", "preview", "resume") and not speaks:
            continue
        elif kind == "end":
            speaks = False
            cutter.end_speech(max(0, client.sent - amount // 10))
            messages.append(cutter.commit())
            dropped = True
        elif kind == "preview":
            check(cutter.preview(max(0, client.sent - amount // 10)))
        elif kind == "resume":
            cutter.resume()
        elif kind == "commit":
            messages.append(cutter.commit())
        elif kind == "split":
            cutter.split()
        elif kind == "drop":
            cutter.drop_first(amount % 3)
        elif kind == "gate":
            cutter.gate(amount)
        elif kind == "ungate":
            cutter.gate(None)
        else:
            speaks = False
            cutter.clear()
        units = [unit for stretch in cutter.stretches() for unit in stretch.units]
        check(cutter.stretches())
        if not dropped:
            assert all(a is b for a, b in zip(known, units, strict=False))
            assert len(units) >= len(known)
        assert cutter.nbytes >= 0
    messages.append(cutter.commit())
    for message in messages:
        check(message)
    samples = sound_of(itertools.chain.from_iterable(messages))
    assert (np.diff(samples) > 0).all()
    if not gated and not {kind for kind, _ in steps} & {"drop", "gate", "clear", "preview", "end"}:
        np.testing.assert_array_equal(samples, np.arange(client.sent))
