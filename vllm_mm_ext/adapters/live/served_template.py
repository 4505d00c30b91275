"""The served model's chat template as vLLM applies it, and its tokens around reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mm_ext.adapters.live.template_pieces import Render, TemplateError
from vllm_mm_ext.live.reasoning import BEGIN, END, Reasoning


def renderer_of(chat: Any, model_config: Any, tokenizer: Any) -> Render:
    """A function that applies the served model's chat template.

    Args:
        chat: vLLM's handler of chat completions, which has the server's settings of templates.
        model_config: vLLM's.
        tokenizer: The served model's.
    """
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

    content_format = resolve_chat_template_content_format(
        chat.chat_template,
        None,
        chat.chat_template_content_format,
        tokenizer,
        model_config=model_config,
    )

    def contents(parts: Sequence[Mapping[str, Any]]) -> Any:
        if content_format == "openai":
            return list(parts)
        model = get_model_cls(model_config)
        return "\n".join(
            part["text"] if part["type"] == "text" else model.get_placeholder_str(part["type"], 1)
            for part in parts
        )

    def render(messages: Sequence[Mapping[str, Any]], asking: bool) -> str:
        talk = [{**message, "content": contents(message["content"])} for message in messages]
        rendered: str = safe_apply_chat_template(
            model_config,
            tokenizer,
            talk,
            chat_template=chat.chat_template,
            tokenize=False,
            **{**chat.default_chat_template_kwargs, "add_generation_prompt": asking},
        )
        return rendered

    return render


def reasoning_of(tokenizer: Any, *, begun: bool) -> Reasoning | None:
    """How the served model sets reasoning apart from its answers; None: it has no tokens for that.

    Args:
        tokenizer: The served model's.
        begun: The chat template lets every answer begin with reasoning.

    Raises:
        TemplateError: It does, and where the reasoning ends cannot be told.
    """
    begin, end = (tokenizer.encode(mark, add_special_tokens=False) for mark in (BEGIN, END))
    # A tokenizer may have one token for all that it does not know.
    known = [tokenizer.decode(ids).strip() for ids in (begin, end)] == [BEGIN, END]
    if known and len(begin) == len(end) == 1:
        return Reasoning(
            begin[0],
            end[0],
            not tokenizer.decode(end, skip_special_tokens=True),
            begun,
            lambda token: not tokenizer.decode([token]).strip("\n"),
        )
    if begun:
        raise TemplateError(
            f"the chat template lets answers begin with {BEGIN!r}, and the model's tokenizer has "
            f"no token {END!r}"
        )
    return None
