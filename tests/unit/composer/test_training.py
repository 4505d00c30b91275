"""Training: prompts and masks, the loop, resuming, folders, composing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperModel,
)
from typer.testing import CliRunner

from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import (
    IGNORED,
    encode_media,
    make_batch,
    read_text,
    right_answers,
)
from vllm_mm_ext.composer.training.clips import COLOURS, GLIDES, MOTIONS, PITCHES, SHAPES, draw_clip
from vllm_mm_ext.composer.training.compose import app as compose_app
from vllm_mm_ext.composer.training.compose import compose
from vllm_mm_ext.composer.training.curriculum import plan_step
from vllm_mm_ext.composer.training.data import folder_batches, generated_batches
from vllm_mm_ext.composer.training.evaluate import (
    accuracy,
    held_out_notes,
    held_out_samples,
    held_out_windows,
    note_scores,
)
from vllm_mm_ext.composer.training.folder import read_folder
from vllm_mm_ext.composer.training.model import fresh_model, tiny_config
from vllm_mm_ext.composer.training.muon import orthogonal
from vllm_mm_ext.composer.training.note_language import (
    NOTE_PROMPT,
    NOTHING,
    RECORDING_TASKS,
    clock,
    note_line,
    read_entries,
)
from vllm_mm_ext.composer.training.note_samples import notes_sample, window_sample
from vllm_mm_ext.composer.training.render import encode_clip
from vllm_mm_ext.composer.training.samples import HELD_OUT, Sample, generated_sample
from vllm_mm_ext.composer.training.things import heard_so_far, seen_so_far, thing_labels
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer
from vllm_mm_ext.composer.training.train import app as train_app
from vllm_mm_ext.composer.training.trainer import Recipe, Trainer, save_checkpoint
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import make_tokenizer

TOKENIZER = build_tokenizer()
CONFIG = tiny_config(TOKENIZER, layers=1)


def small_sample(seed: int, *, independent: bool = True, sound: bool = True) -> Sample:
    return generated_sample(seed, 4, 8, 3, 64, independent=independent, sound=sound)


def trainer(**changes: object) -> Trainer:
    def batches(step: int):
        samples = [small_sample(step * 2 + k, sound=step != 1) for k in range(2)]
        return make_batch(CONFIG, TOKENIZER, samples, 1 + step % 2, 4 if step > 1 else 1)

    recipe = Recipe(**({"steps": 4, "seed": 5, "warmup": 1, "perception_steps": 9} | changes))
    return Trainer(fresh_model(CONFIG, 5), TOKENIZER, recipe, batches)


def logits_of(model: ComposerForConditionalGeneration, samples: list[Sample]) -> torch.Tensor:
    batch = make_batch(model.config, TOKENIZER, samples, 2, 4)
    with torch.no_grad():
        return read_text(model, batch, encode_media(model, batch)).logits


def test_prompts_are_those_of_the_chat_template() -> None:
    sample = small_sample(3, independent=False)
    batch = make_batch(CONFIG, TOKENIZER, [sample], 1, 1)
    content = [{"type": "text", "text": sample.turns[0].text}, {"type": "video"}]
    messages = [{"role": "user", "content": content}]
    messages += [{"role": "assistant", "content": sample.turns[0].answer}]
    for turn in sample.turns[1:]:
        messages += [
            {"role": "user", "content": turn.text},
            {"role": "assistant", "content": turn.answer},
        ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    before, after = text.split("<|video_pad|>")
    ids = batch.input_ids[0].tolist()
    assert ids[0] == TOKENIZER.encode(before)[0]
    assert ids[1] == CONFIG.video_start_token_id
    end = len(ids) - ids[::-1].index(CONFIG.video_end_token_id)
    assert ids[end:] == TOKENIZER.encode(after)
    for span, turn in zip(batch.spans, sample.turns, strict=True):
        told = batch.labels[0, span.start : span.end].tolist()
        assert TOKENIZER.decode(told) == turn.answer + "<|end|>"
    outside = batch.labels[0] != IGNORED
    assert int(outside.sum()) == sum(span.end - span.start for span in batch.spans)


def test_independent_questions_get_the_answers_of_first_questions() -> None:
    model = fresh_model(CONFIG, 0).eval()
    sample = small_sample(11)
    together = logits_of(model, [sample])
    alone = [
        logits_of(
            model, [Sample(sample.frames, sample.seconds, sample.sound, [turn], independent=False)]
        )
        for turn in sample.turns
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_mentions_are_the_tokens_that_end_a_name_or_ask_about_it() -> None:
    samples = [small_sample(seed, independent=seed % 2 == 0) for seed in range(6)]
    batch = make_batch(CONFIG, TOKENIZER, samples, 2, 4)
    names = iter(
        [
            (row, turn, one)
            for row, s in enumerate(samples)
            for turn in s.turns
            for one in turn.references
        ]
    )
    asking = {(span.row, span.start) for span in batch.spans}
    ends = 0
    for mention in batch.mentions:
        if (mention.row, mention.position) in asking:
            continue
        row, turn, reference = next(names)
        told = TOKENIZER.decode(batch.input_ids[row, : mention.position + 1])
        assert (mention.row, mention.thing) == (row, reference.thing)
        assert told.endswith(turn.text[: reference.end])
        ends += 1
    assert ends > 6
    assert next(names, None) is None


def test_labels_of_things_are_what_the_clip_shows() -> None:
    for seed in range(20):
        sample = generated_sample(seed, 16, 32, 12, 64)
        assert sample.clip is not None
        for turn in sample.turns:
            for reference in turn.references:
                classes, path = thing_labels(reference.thing, sample)
                begin, shape, colour, motion, pitch, glide = classes
                match turn.task:
                    case "colour" | "flash_colour":
                        assert list(COLOURS)[colour] == turn.answer
                    case "shape":
                        assert SHAPES[shape] == turn.answer
                    case "motion":
                        assert MOTIONS[motion] == turn.answer
                        (x, y), (later_x, later_y) = path[:2], path[2:]
                        moved = {
                            "left": later_x < x,
                            "right": later_x > x,
                            "up": later_y < y,
                            "down": later_y > y,
                            "still": (x, y) == (later_x, later_y),
                        }
                        assert moved[turn.answer]
                    case "flash_time":
                        assert str(begin) == turn.answer
                    case "pitch":
                        assert PITCHES[pitch] == turn.answer
                    case "glide":
                        assert GLIDES[glide] == turn.answer
                    case "on_screen":
                        assert turn.answer in (SHAPES[shape], list(COLOURS)[colour])


@pytest.mark.parametrize("temporal", [1, 4])
def test_what_has_begun_by_the_end_is_all_that_was_seen_and_heard(temporal: int) -> None:
    for seed in range(12):
        sample = generated_sample(seed, 16, 40, 1, 64)
        assert sample.clip is not None
        shown = [sample.clip.flash_at(second) for second in sample.seconds]
        so_far = seen_so_far(sample, temporal)
        assert len(so_far) == -(-40 // temporal)
        assert so_far == sorted(so_far, key=lambda one: one[:2])
        assert so_far[-1][1] == len({flash for flash in shown if flash})
        heard = heard_so_far(sample, 0.4)
        assert len(heard) == sum(CONFIG.audio_tokens(16 * 16_000))
        assert heard == sorted(heard)
        assert heard[-1] == len(sample.clip.tones or ())


def test_padding_changes_no_result() -> None:
    model = fresh_model(CONFIG, 0).eval()
    short, long = small_sample(1), generated_sample(2, 7, 15, 6, 64)
    torch.testing.assert_close(
        logits_of(model, [short, long]),
        torch.cat([logits_of(model, [one]) for one in (short, long)]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_greedy_decoding_tells_what_teacher_forcing_calls_right() -> None:
    model = fresh_model(CONFIG, 0).eval()
    samples = [
        Sample(s.frames, s.seconds, s.sound, s.turns[:1], False)
        for s in map(small_sample, range(3))
    ]
    batch = make_batch(CONFIG, TOKENIZER, samples, 1, 1)
    with torch.no_grad():
        media = encode_media(model, batch)
        logits = read_text(model, batch, media).logits
        embeds = model.inputs_embeds(batch.input_ids, media.video, media.audio)
    outcome = [right for _, right in right_answers(batch, logits)]
    for span, right in zip(batch.spans, outcome, strict=True):
        told = batch.labels[span.row, span.start : span.end].tolist()
        prompt = embeds[span.row, : span.start + 1]
        answer = model.greedy(prompt, len(told) + 1, TOKENIZER.eos_token_id)
        assert (answer == told[:-1]) == right


def test_towers_frozen_when_resuming_stay_as_they_were(tmp_path: Path) -> None:
    first = trainer()
    first.train_step()
    first.save(tmp_path)
    frozen = trainer(freeze_towers=True)
    frozen.resume(tmp_path)
    before = {name: tensor.clone() for name, tensor in frozen.model.state_dict().items()}
    for _ in range(2):
        frozen.train_step()
    changed = {
        name.split(".")[0]
        for name, tensor in frozen.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"video_projector", "audio_projector", "language_model"}


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = trainer()
    for _ in range(4):
        whole.train_step()
    first = trainer()
    for _ in range(2):
        first.train_step()
    first.save(tmp_path)
    second = trainer()
    second.resume(tmp_path)
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    for (name, one), other in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_resuming_another_training_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path)
    with pytest.raises(ValueError, match="seed 5, this one has 6"):
        trainer(seed=6).resume(tmp_path)


def test_projectors_only_leaves_all_else_as_it_was() -> None:
    one = trainer(projectors_only=True)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.train_step()
    changed = {n for n, tensor in one.model.state_dict().items() if not tensor.equal(before[n])}
    assert changed
    assert {name.split(".")[0] for name in changed} == {"video_projector", "audio_projector"}


def test_a_saved_checkpoint_loads_with_the_same_weights(tmp_path: Path) -> None:
    model = fresh_model(CONFIG, 1)
    save_checkpoint(model, TOKENIZER, tmp_path)
    loaded = ComposerForConditionalGeneration.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    text = "Wörter, 3 Töne?"
    assert AutoTokenizer.from_pretrained(tmp_path).decode(TOKENIZER.encode(text)) == text


def test_generated_batches_follow_from_seed_and_step_and_are_not_held_out() -> None:
    one, other = (generated_batches(CONFIG, TOKENIZER, 4, 10)(7) for _ in range(2))
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.pixel_values, other.pixel_values)
    assert all(s.clip is not None and s.clip.seed < HELD_OUT for s in one.samples)
    assert all(s.clip is not None and s.clip.seed >= HELD_OUT for s in held_out_samples(3, 64))


def test_accuracy_covers_all_reductions() -> None:
    model = fresh_model(CONFIG, 0)
    found = accuracy(model, TOKENIZER, [small_sample(HELD_OUT + 1)])
    assert set(found) == {
        f"pool {pool}, temporal {temporal}" for pool in (1, 2) for temporal in (1, 4)
    }
    assert all(0 <= share <= 1 for shares in found.values() for share in shares.values())


def test_muon_updates_are_nearly_orthogonal() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 24, 10)))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    encode_clip(draw_clip(1, 4), path / "a.mp4", size=64)
    encode_clip(draw_clip(2, 4, sound=False), path / "b.mp4", size=64)
    turns = [{"question": "What is it?", "answer": "a clip"}, {"question": "Red?", "answer": "no"}]
    lines = [json.dumps({"video": name, "turns": turns}) for name in ("a.mp4", "b.mp4")]
    (path / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_is_read_in_another_order_each_time_through(folder: Path) -> None:
    batches = folder_batches(CONFIG, TOKENIZER, read_folder(folder), seed=0, clips=2, frames=4)
    batch = batches(0)
    assert sorted(len(s.sound) > 0 if s.sound is not None else False for s in batch.samples) == [
        False,
        True,
    ]
    assert batch.frames_per_item == [4, 4]
    assert [span.task for span in batch.spans] == ["all"] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"video": "none.mp4", "turns": []}', "no file 'none.mp4'"),
        ('{"video": "a.mp4", "turns": []}', "at least one question"),
        ('{"video": "a.mp4", "turns": [{"question": "x", "answer": " "}]}', "must be text"),
        ('{"video": "a.mp4", "turns": ["x"]}', "a turn must be"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "conversations.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    tokenizer = make_tokenizer([], vocab_size=300, named={}, chat_template="{{ messages }}")
    tokenizer.save_pretrained(root / "text")
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
        )
    ).save_pretrained(root / "text")
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(root / "vision")
    WhisperModel(
        WhisperConfig(
            vocab_size=300,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
        )
    ).save_pretrained(root / "audio")
    return {name: root / name for name in ("text", "vision", "audio")}


def test_a_composed_checkpoint_holds_its_sources_and_runs(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "out"), "--fp32", "--reduction", "2x2"]
    for name, path in sources.items():
        arguments += [f"--{name}", str(path)]
    result = CliRunner().invoke(compose_app, arguments)
    assert result.exit_code == 0, result.output
    model = ComposerForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    source = SiglipVisionModel.from_pretrained(sources["vision"]).state_dict()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, source[name]), name
    ears = WhisperModel.from_pretrained(sources["audio"]).encoder.state_dict()
    for name, tensor in model.audio_tower.state_dict().items():
        assert torch.equal(tensor, ears[name]), name
    rows = Qwen3ForCausalLM.from_pretrained(sources["text"]).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)
    sample = Sample(
        np.zeros((3, 32, 32, 3), np.uint8),
        [0.0, 0.5, 1.0],
        np.zeros(16_000, np.float32),
        small_sample(0).turns[:2],
        independent=False,
    )
    batch = make_batch(model.config, tokenizer, [sample], 2, 2)
    _, logits, labels = read_text(model, batch, encode_media(model, batch))
    assert logits.shape == (len(labels), model.get_input_embeddings().num_embeddings)
    assert torch.isfinite(logits).all()


def test_checkpoints_of_another_kind_are_named(sources: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="text holds a qwen3, not a SigLIP"):
        compose(sources["text"], sources["text"], None, reductions=[])


def test_the_command_trains_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    init = tmp_path / "init"
    save_checkpoint(fresh_model(CONFIG, 2), TOKENIZER, init)
    arguments = [str(tmp_path / "out"), "--init", str(init), "--folder", str(folder)]
    arguments += ["--clips", "1", "--frames", "2", "--device", "cpu", "--fp32"]
    result = runner.invoke(train_app, [*arguments, "--steps", "1"])
    assert result.exit_code == 0, result.output
    again = runner.invoke(train_app, [*arguments, "--steps", "2"])
    assert again.exit_code == 2
    assert "--resume" in again.output
    export = tmp_path / "export"
    more = [*arguments, "--steps", "2", "--resume", "--export", str(export)]
    result = runner.invoke(train_app, more)
    assert result.exit_code == 0, result.output
    exported = ComposerForConditionalGeneration.from_pretrained(export)
    assert exported.dtype == torch.bfloat16


def test_answers_from_notes_are_asked_as_the_chat_template_lays_texts_out() -> None:
    sample = notes_sample(3, 4, 6, 64)
    batch = make_batch(CONFIG, TOKENIZER, [sample], 1, 1)
    ids = batch.input_ids[0].tolist()
    for span, turn in zip(batch.spans, sample.turns, strict=True):
        parts = [{"type": "text", "text": text} for text in (sample.text, turn.text)]
        prompt = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        assert batch.visible is not None
        visible = batch.visible[0, 0, span.start]
        assert [token for token, seen in zip(ids, visible, strict=True) if seen] == (
            TOKENIZER.encode(prompt)
        )
        told = batch.labels[0, span.start : span.end].tolist()
        assert TOKENIZER.decode(told) == turn.answer + "<|end|>"


def test_windows_are_asked_for_notes_and_for_what_is_in_them() -> None:
    found: dict[str, set[str]] = {}
    for seed in range(30):
        sample = window_sample(seed, 8 if seed % 2 else 40, 9, 16, sound=seed % 7 > 0)
        assert len(sample.turns) <= 9
        assert (sample.sound is not None) == (seed % 7 > 0)
        noted = [turn for turn in sample.turns if turn.task.startswith("note")]
        assert len(noted) == (seed % 2 == 0)
        for turn in sample.turns:
            found.setdefault(turn.task, set()).add(turn.answer)
            if turn.task.startswith("note"):
                assert turn.text.endswith(NOTE_PROMPT)
                assert note_line(read_entries(turn.answer)) == turn.answer
    assert found["relevance"] == {"yes", "no"}


def test_what_matters_are_entries_of_the_notes_and_they_give_the_same_answers() -> None:
    tasks: set[str] = set()
    for seed in range(40):
        sample = notes_sample(seed, 1 + seed % 9, 16, 16)
        noted = read_entries(sample.text)
        assert (sample.text == "\n") == (not noted)
        for turn in sample.turns:
            tasks.add(turn.task)
            if turn.task == "select":
                chosen = read_entries(turn.answer)
                assert (turn.answer == NOTHING) == (not chosen)
                assert set(chosen) <= set(noted)
                assert chosen == [entry for entry in noted if entry in chosen]
            if turn.task == "told_when":
                assert f"[{turn.answer}]" in sample.text
    assert tasks == {"select", *(f"told_{task}" for task in RECORDING_TASKS)}


def test_steps_with_notes_train_on_text_and_windows_alike() -> None:
    plans = {plan.kind: step for step in range(40) if (plan := plan_step(CONFIG, 1, step, 0))}
    assert set(plans) == {"clips", "windows", "notes"}
    batches = generated_batches(CONFIG, TOKENIZER, 1, 0)
    one = Trainer(fresh_model(CONFIG, 1), TOKENIZER, Recipe(steps=9), batches)
    for step in plans.values():
        one.step = step
        loss, answers = one.train_step()
        assert loss > 0
        assert answers


def test_notes_that_a_model_writes_are_scored_by_kind_of_entry() -> None:
    samples = held_out_windows(2, 64, (16,))
    scores = note_scores(fresh_model(CONFIG, 0), TOKENIZER, samples)
    assert set(scores) == {"scene", "flash", "tone"}
    found = accuracy(fresh_model(CONFIG, 0), TOKENIZER, held_out_notes(2, 64, (2,)), [(1, 1)])
    assert "select" in found["pool 1, temporal 1"]


def test_marks_are_the_tokens_that_end_an_entry_and_count_what_came_before() -> None:
    sample = notes_sample(1, 6, 4, 64)
    batch = make_batch(CONFIG, TOKENIZER, [sample], 1, 1)
    entries = read_entries(sample.text)
    assert len(batch.marks) == len(entries) > 3
    flashes = 0
    for mark, entry in zip(batch.marks, entries, strict=True):
        told = TOKENIZER.decode(batch.input_ids[mark.row, : mark.position + 1])
        assert told.endswith(f"[{clock(entry.second)}] {entry.text}")
        hour, minute, second, counted, _ = mark.labels
        assert hour * 3600 + minute * 60 + second == entry.second
        flashes += entry.kind == "flash"
        assert counted == flashes
