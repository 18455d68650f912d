"""The chat templates that the families publish with their processors (jinja), and how to fill them in."""

from __future__ import annotations

from typing import Any

_EACH = (
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ IMAGE }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
)
_IMAGES = "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ IMAGE }}{% endfor %}"
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}TEXT{% endfor %}"


def _texts(text: str) -> str:
    return _TEXTS.replace("TEXT", "{{ " + text + " }}")


_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}" + _EACH + "{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# What the processors expand stands in the templates as IMAGE; a line end behind it where the family has one.
PUBLISHED: dict[str, str] = {
    "llava": (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        + _IMAGES
        + _texts("content['text'] + ' '")
        + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        + _IMAGES
        + _texts("content['text']")
        + "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}"
        + _IMAGES
        + _texts("content['text'] | trim")
        + "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # Without what it says about tools
    "llama32": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}"
        "{%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content']|trim %}"
        "{%- else %}{%- set system_message = messages[0]['content'][0]['text']|trim %}{%- endif %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}\n"
        "{% set image_ns = namespace(has_images=false) %}\n"
        "{%- for message in messages %}{%- for content in message['content'] %}"
        "{%- if content['type'] == 'image' %}{%- set image_ns.has_images = true %}{%- endif %}"
        "{%- endfor %}{%- endfor %}\n"
        "{%- if not image_ns.has_images %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}"
        "{{- system_message }}{{- '<|eot_id|>' }}{%- endif %}\n"
        "{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
        "{%- for content in message['content'] %}{%- if content['type'] == 'image' %}{{- IMAGE }}"
        "{%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
        "{{- '<|eot_id|>' }}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "chatml": _CHATML,
    "qwen": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}" + _SYSTEM + "{% endif %}"
        "<|im_start|>{{ message['role'] }}\n" + _EACH + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "ovis2": _SYSTEM + _CHATML,
    "onevision": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
        + _IMAGES
        + _texts("'\n' + content['text']")
        + "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}"
        "{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
        "{%- for message in loop_messages -%}"
        "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
        "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
        "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ IMAGE }}"
        "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
    ),
    "idefics3": (
        "{{ bos_token }}{% for message in messages %}{{message['role'].capitalize()}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ IMAGE }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}


def render(name: str, messages: list[dict[str, Any]], image: str, bos: str, *, prompt: bool) -> str:
    """The published template filled in, as transformers renders it (blocks trimmed)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PUBLISHED[name])
    return template.render(messages=messages, add_generation_prompt=prompt, bos_token=bos, IMAGE=image)


def as_content(text: str, line: bool) -> list[dict[str, str]]:
    """ "<image>\\nhue?" -> an image, a text. line: the family's template puts the line end behind an image."""
    content: list[dict[str, str]] = []
    for i, part in enumerate(text.split("<image>")):
        if i:
            content.append({"type": "image"})
            part = part.removeprefix("\n") if line else part
        if part:
            content.append({"type": "text", "text": part})
    return content
