"""Our templates in the language of Hugging Face's chat templates. Pure: text to text."""

from __future__ import annotations

import json

from vlm_nemo.data.chat import Template
from vlm_nemo.types import IMAGE_MARKER

LINE = IMAGE_MARKER + "\n"


def jinja(template: Template, image: str = LINE, images_first: bool = True) -> str:
    """A chat template that says the text which training saw, from bos to eos.

    Contents are text, or lists of {"type": "text" | "image"}. image: what stands for one, until the family's processor
    puts its placeholders there ("" = it needs no mark). images_first: a turn's images come before its text, as LLaVA
    has them; otherwise they stay where they are. `add_generation_prompt` ends where the assistant starts to speak.
    """
    t = template
    mark = image.strip("\n")
    said = f"{q(t.system_start)} + {{}} + {q(t.system_end)}"
    own = q(t.system_start + t.system + t.system_end if t.system else "")
    if t.preamble:
        said = f"{q(t.system_start)} + preamble + {{}} + {q(t.system_end)}"
        own = f"({q(t.system_start)} + preamble + {q(t.system + t.system_end)} if preamble else {own})"
    behind = "text(message['content'])"
    if t.user_lead:
        behind = f"({q('')} if {behind}.startswith({q(mark)}) else {q(t.user_lead)}) + {behind}"
    if t.system_in_turn:
        behind = f"(said if loop.first else {q('')}) + {behind}"
    end = q(t.assistant_end) if t.assistant_end else "eos_token"
    answer = f"{q(t.assistant_start + t.assistant_lead)} + text(message['content']) | trim + {end}"
    return "".join(
        [
            _text_of(mark, image, images_first),
            say("bos_token") if t.bos else "",
            _preamble(t.preamble, mark) if t.preamble else "",
            run("if messages and messages[0]['role'] == 'system'"),
            run("set said = " + said.format("text(messages[0]['content'])")) + run("set turns = messages[1:]"),
            run("else") + run(f"set said = {own}") + run("set turns = messages") + run("endif"),
            "" if t.system_in_turn else say("said"),
            run("for message in turns") + run("if message['role'] == 'user'"),
            (run("if not loop.first") + say(q(t.between)) + run("endif")) if t.between else "",
            say(f"{q(t.user_start)} + {behind} + {q(t.user_end)}"),
            run("else") + say(answer) + run("endif") + run("endfor"),
            run("if add_generation_prompt") + say(q(t.assistant_start)) + run("endif"),
        ]
    )


def _preamble(text: str, mark: str) -> str:
    """Sets what stands before the system's text: nothing where any message has an image."""
    inside = " or ".join(f"{q(name)} in message['content']" for name in dict.fromkeys((IMAGE_MARKER, mark)))
    kinds = "message['content'] | selectattr('type', 'equalto', 'image') | list"
    seen = f"(({inside}) if message['content'] is string else ({kinds}))"
    return "".join(
        [
            run(f"set ns = namespace(preamble={q(text)})"),
            run("for message in messages") + run(f"if {seen}") + run(f"set ns.preamble = {q('')}") + run("endif"),
            run("endfor") + run("set preamble = ns.preamble"),
        ]
    )


def _text_of(mark: str, image: str, images_first: bool) -> str:
    """The macro that makes text of a turn's contents."""
    text = "content"
    if mark != IMAGE_MARKER:
        # a family whose processor needs no mark takes the line's end too
        text += "" if mark else f" | replace({q(LINE)}, {q('')})"
        text += f" | replace({q(IMAGE_MARKER)}, {q(mark)})"
    kinds = ("item['type'] == 'image'", "item['type'] == 'text'")
    if images_first:
        images = run(f"for item in content if {kinds[0]}") + say(q(image)) + run("endfor")
        items = images + run(f"for item in content if {kinds[1]}") + say("item['text']") + run("endfor")
    else:
        both = run(f"if {kinds[0]}") + say(q(image)) + run(f"elif {kinds[1]}") + say("item['text']") + run("endif")
        items = run("for item in content") + both + run("endfor")
    whole = run("if content is string") + say(text) + run("else") + items + run("endif")
    return run("macro text(content)") + whole + run("endmacro")


def say(expression: str) -> str:
    return "{{- " + expression + " -}}"


def run(statement: str) -> str:
    return "{%- " + statement + " -%}"


def q(text: str) -> str:
    """A string literal."""
    return json.dumps(text)
