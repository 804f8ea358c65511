"""Chat messages to the text a Ling 2.0 instruct model was trained on."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

SWITCH = "detailed thinking off"

# Written from the format's description; a released tokenizer_config.json brings its own template, which is then
# used instead. Roles: system, user, assistant, tool.
# - The first turn is always SYSTEM: the system text, the tools, and the line that switches thinking off.
# - Reasoning of an assistant turn is shown only after the last user query. A user message that is nothing but
#   a tool's response is no query.
# - Tool results in a row share one OBSERVATION turn.
LING_CHAT_TEMPLATE = """\
{%- set last = namespace(query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set text = message.content | trim %}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
            {%- set last.query = loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{{- '<role>SYSTEM</role>' }}
{%- if messages and messages[0].role == 'system' %}
    {{- messages[0].content + '\\n' }}
{%- endif %}
{%- if tools %}
    {{- '# Tools\\n\\nYou may call these functions; each line describes one of them as JSON:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nTo call a function, answer with its name and arguments as JSON inside tool_call tags:' }}
    {{- '\\n<tool_call>\\n{"name": <function name>, "arguments": <object>}\\n</tool_call>\\n' }}
{%- endif %}
{{- 'detailed thinking ' + ('on' if enable_thinking else 'off') + '<|role_end|>' }}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- '<role>SYSTEM</role>' + content + '<|role_end|>' }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<role>HUMAN</role>' + content + '<|role_end|>' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = reasoning or content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<role>ASSISTANT</role>' }}
        {%- if reasoning and loop.index0 > last.query %}
            {{- '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {%- if content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|role_end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}
            {{- '<role>OBSERVATION</role>' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|role_end|>' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('unknown role ' ~ message.role ~ ' in message ' ~ loop.index0
                            ~ ': use system, user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<role>ASSISTANT</role>' }}
{%- endif %}
"""


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models are trained on the plain text.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment HF renders chat templates in, so that a released template gives the same text here."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Renders a conversation as one string, special tokens spelled out.

    Args:
      messages: dicts with "role" and "content"; an assistant's may also carry "reasoning_content" and
        "tool_calls" (dicts with "name" and "arguments", or that under "function").
      tools: JSON function schemas.
      add_generation_prompt: end with the opened assistant turn.
      template: a jinja2 chat template; None is Ling 2.0's.
      variables: further names a template may read, such as "bos_token".

    Raises:
      ValueError: for a role the template doesn't know, a message without content, or a broken template.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        only_calls = content is None and message.get("role") == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            raise ValueError(f"message {index} has content {content!r}; it must be a string")
    template = LING_CHAT_TEMPLATE if template is None else template
    if (variables or {}).get("enable_thinking") and "enable_thinking" not in template:
        # Ling's released template spells the switch out, always off (spec 3.4).
        if SWITCH not in template:
            raise ValueError("the chat template has no switch for thinking")
        template = template.replace(SWITCH, SWITCH.removesuffix("off") + "on")
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            **(variables or {}), messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template can't render these messages: {error}") from error
