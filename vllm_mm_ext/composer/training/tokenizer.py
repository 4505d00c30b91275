"""The tokenizer and chat template of a composer trained from nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_mm_ext.composer.configuration import SPECIAL_TOKENS
from vllm_mm_ext.composer.training.clips import draw_clip
from vllm_mm_ext.composer.training.note_language import (
    NOTE_PROMPT,
    NOTHING,
    RELEVANCE_PROMPT,
    SELECT_PROMPT,
    clip_entries,
    recording_line,
)
from vllm_mm_ext.composer.training.questions import questions
from vllm_mm_ext.composer.training.recordings import draw_recording

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

_PARTS = (
    "{%- if message['content'] is string -%}"
    "{{ message['content'] | trim }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('video', 'video_url') -%}{{ '<|video_pad|>' }}"
    "{%- elif part['type'] in ('audio', 'audio_url', 'input_audio') -%}{{ '<|audio_pad|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text')"
    " | map('trim') | join('\\n') }}"
    "{%- endif -%}"
)


def chat_template(opening: str, end: str, ends_all: bool) -> str:
    """Jinja chat template. Media of a turn stand before its text, as in training, and several
    texts on lines of their own.

    Args:
        opening: Jinja expression of what a turn begins with; ``role`` is its role.
        end: What an assistant's turn ends with.
        ends_all: All turns end with it.
    """
    closing = f"{{{{ '{end}' }}}}"
    if not ends_all:
        closing = "{%- if message['role'] == 'assistant' -%}" + closing + "{%- endif -%}"
    return (
        "{%- for message in messages -%}{%- set role = message['role'] -%}"
        f"{{{{ {opening} }}}}{_PARTS}{closing}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{%- set role = 'assistant' -%}"
        f"{{{{ {opening} }}}}"
        "{%- endif -%}"
    )


OWN_TEMPLATE = chat_template("'<|' + role + '|>'", END, ends_all=False)
CHATML_TEMPLATE = chat_template("'<|im_start|>' + role + '\\n'", "<|im_end|>\\n", ends_all=True)


class ChatPieces(NamedTuple):
    """Token ids around the contents of a conversation, as a chat template puts them.

    Attributes:
        opening: Before the first question.
        asking: Between a question and its answer.
        closing: Between an answer and the next question; begins with what ends the answer.
    """

    opening: list[int]
    asking: list[int]
    closing: list[int]


def chat_pieces(tokenizer: Any) -> ChatPieces:
    """The pieces of a tokenizer's chat template.

    Raises:
        ValueError: The tokenizer has no chat template, or one that hides what is said.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    question, answer, again = "question0", "answer0", "question1"
    text: str = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": again},
        ],
        tokenize=False,
    )
    asked: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    pieces = (
        asked.partition(question)[0],
        asked.partition(question)[2],
        text.partition(answer)[2].partition(again)[0],
    )
    if not all(pieces[1:]):
        raise ValueError("the chat template does not show questions and answers as they are")
    return ChatPieces(*(tokenizer.encode(piece, add_special_tokens=False) for piece in pieces))


_CORPUS_CLIPS, _CORPUS_RECORDINGS = 400, 200
_GENERAL = (
    "What happens in this video? Describe what you see and hear. "
    "The quick brown fox jumps over the lazy dog. Please answer with one word. "
    "Is there any sound in the clip? How long is it? Yes, no, maybe, I do not know."
)


def build_tokenizer(vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on generated questions and answers.

    Any text round-trips; every special token is one id.

    Args:
        vocab_size: Most entries, special tokens and the 256 bytes included.
    """
    special = [PAD, END, SYSTEM, USER, ASSISTANT, *SPECIAL_TOKENS.values()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = OWN_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    rng = np.random.default_rng(0)
    texts = [_GENERAL] * 2
    for seed in range(_CORPUS_CLIPS):
        for question in questions(draw_clip(seed, 4 + seed % 57), rng):
            texts += [question.text, question.answer]
    for seed in range(_CORPUS_RECORDINGS):
        recording = draw_recording(seed, 120)
        texts += [recording_line(clip_entries(recording.window(0, 120))), NOTHING]
        for question in recording.questions(rng)[:4]:
            texts.append(RELEVANCE_PROMPT.format(question=question.text))
            texts.append(SELECT_PROMPT.format(question=question.text))
    texts += [NOTE_PROMPT] * 3
    # Every answer of a time of its own is one token, and so is each part of a time.
    texts += [str(number) for number in range(121)] * 3
    texts += [f"{number:02}" for number in range(60)] * 3
    return texts
