"""The tokenizer and chat template of a composer trained from nothing."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_mm_ext.models.composer.configuration import SPECIAL_TOKENS
from vllm_mm_ext.training.clips import draw_clip
from vllm_mm_ext.training.questions import questions

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

# A turn is its role's tag and its text; an assistant's ends with <|end|>. Media of a turn stand
# before its text, wherever they stand among its parts, as in training.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string -%}"
    "{{ message['content'] | trim }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('video', 'video_url') -%}{{ '<|video_pad|>' }}"
    "{%- elif part['type'] in ('audio', 'audio_url', 'input_audio') -%}{{ '<|audio_pad|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

_CORPUS_CLIPS = 400
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
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    rng = np.random.default_rng(0)
    texts = [_GENERAL] * 2
    for seed in range(_CORPUS_CLIPS):
        for question in questions(draw_clip(seed, 4 + seed % 57), rng):
            texts += [question.text, question.answer]
    # Every answer of a time of its own is one token.
    texts += [str(number) for number in range(121)] * 3
    return texts
