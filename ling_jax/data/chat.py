"""Chat messages to the text a Ling 2.0 instruct model was trained on."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

# What templates call the switch for thinking, and its two values: Qwen's and GLM's, DeepSeek's, Ling's own.
SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "thinking_option": ("off", "on"),
}

NO_SWITCH = "the chat template has no switch for thinking"

# Written from the format's description; a release brings its own template, which is then used instead. The words around
# the tools are part of the format: the models were trained on them. Roles: system, user, assistant, tool.
# - The first turn is always SYSTEM: the system text, the tools, and the line that switches thinking off.
# - Reasoning of an assistant turn is shown only after the last user query, and so never without one. A user message
#   that is nothing but a tool's response is no query.
# - Tool results in a row share one OBSERVATION turn.
LING_CHAT_TEMPLATE = """\
{%- set last = namespace(query=messages | length) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set text = message.content %}
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
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, ' }}
    {{- '"arguments": <args-json-object>}\\n</tool_call>\\n' }}
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
        {%- set reasoning = message.reasoning_content %}
        {%- if reasoning is not string and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<role>ASSISTANT</role>' }}
        {%- if reasoning and loop.index0 > last.query %}
            {{- '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {%- set content = content.lstrip('\\n') %}
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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what is trained on: what stands inside is rendered as ever."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose bound on `range` holds for repeated texts, and one of its own for powers."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        factors = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
        if operator == "**":
            large = abs(left) > MAX_RANGE or abs(right) > 100
        else:
            large = factors != [left, right] and factors[0] * factors[1] > MAX_RANGE
        if large:
            raise SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models are trained on the plain text.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment HF renders chat templates in, so that a released template gives the same text here."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def _joined(index: int, parts: Sequence[Any]) -> str:
    """The text of a message whose content is a list of parts, a line for each."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"message {index} has content with a part of type {kind!r}; only parts of type 'text' with a string "
                "'text' can be read"
            )
    return "\n".join(part["text"] for part in parts)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages whose contents are strings, or None beside tool calls; a list of parts becomes its text.

    Raises:
      ValueError: naming the first message, and its field, that is none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages is a {type(messages).__name__}; it must be a list of objects")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {index} is {message!r}; it must be an object with a role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"message {index} has role {role!r}; it must be a string")
        if content and isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined(index, content)
        only_calls = content is None and role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            raise ValueError(f"message {index} has content {content!r}; it must be a string, or parts of type 'text'")
        checked.append({**message, "content": content} if "content" in message else dict(message))
    return checked


def _switched(tree: nodes.Template, on: bool) -> nodes.Template:
    """A parsed template with the switch for thinking turned where it is written out: in `detailed thinking off`, or as
    Ling's own does in `set thinking_option = 'off'`."""
    old, new = ("off", "on") if on else ("on", "off")
    written, turned = re.compile(rf"\bdetailed thinking {old}\b"), f"detailed thinking {new}"
    for text in tree.find_all(nodes.TemplateData):
        text.data = written.sub(turned, text.data)
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, str):
            const.value = written.sub(turned, const.value)
    for assign in tree.find_all(nodes.Assign):
        name = getattr(assign.target, "name", None) or getattr(assign.target, "attr", "")
        if "think" in name.lower() and isinstance(assign.node, nodes.Const) and assign.node.value == old:
            assign.node.value = new
    return tree


class _Template:
    """A chat template, which is compiled once in each of its forms."""

    def __init__(self, source: str):
        self._source, self._compiled = source, {}
        self.written: bool | None = None  # whether its switch for thinking is written out; None: not known yet

    def form(self, thinking: bool | None) -> jinja2.Template:
        """The template with the switch for thinking turned where it is written out; None leaves it alone."""
        if thinking not in self._compiled:
            env = _environment()
            tree = env.parse(self._source)
            self._compiled[thinking] = env.from_string(tree if thinking is None else _switched(tree, thinking))
        return self._compiled[thinking]


_template = functools.lru_cache(maxsize=16)(_Template)


def _render_switched(template: _Template, run: Callable[..., str], on: bool, end: bool) -> str:
    """The text with thinking on or off: by the variables that templates read, else where the switch is written out."""
    for written in (False, True) if template.written is None else (template.written,):

        def text(on: bool, end: bool, written: bool = written) -> str:
            variables = {name: values[on] for name, values in SWITCHES.items()}
            return run(on if written else None, add_generation_prompt=end, **variables)

        if template.written is not None or text(True, True) != text(False, True):
            template.written = written
            return text(on, end)
    raise ValueError(f"{NO_SWITCH}: its text is the same with it on and off; leave it unset")


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Renders a conversation as one string, special tokens spelled out, in a sandbox that does not reach Python.

    Args:
      messages: dicts with "role" and "content" (a string, or a list of parts of type "text", a line for each); an
        assistant's may also carry "reasoning_content" and "tool_calls" (dicts with "name" and "arguments", or that
        under "function").
      tools: JSON function schemas.
      add_generation_prompt: end with the opened assistant turn.
      template: a jinja2 chat template; None is Ling 2.0's.
      variables: further names a template may read, such as "bos_token". "enable_thinking" switches thinking on or off
        whatever the template calls it; without it the template's own default holds.

    Raises:
      ValueError: for a role the template doesn't know, a message without content, a template that fails, or one whose
        text is the same with thinking on and off where either is asked for.
    """
    checked, compiled = checked_messages(messages), _template(LING_CHAT_TEMPLATE if template is None else template)
    others = dict(variables or {})
    thinking = others.pop("enable_thinking", None)

    def run(written: bool | None, **more: Any) -> str:
        try:
            return compiled.form(written).render(**{**others, **more}, messages=checked, tools=tools)
        except Exception as error:  # a template is a program of somebody's: it may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template can't render these messages: {reason}") from error

    if thinking is None:
        return run(None, add_generation_prompt=add_generation_prompt)
    return _render_switched(compiled, run, bool(thinking), add_generation_prompt)
