"""Chat formats for checkpoints that bring no template.

`STEP` is the format that Step 3.5 was trained with (architecture of the chat format: blocks
`<|im_start|>ROLE`, reasoning opened by the prompt, reasoning of earlier turns dropped, tools in
the system block), with tool instructions in words of our own; a checkpoint's own template goes
before it. `PLAIN` is for base models, which know no roles: labelled lines of text.
"""

PLAIN = """
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{ message.content + '\\n\\n' }}
  {%- elif message.role == 'user' -%}
    {{ 'User: ' + message.content + '\\n' }}
  {%- elif message.role == 'assistant' -%}
    {{ 'Assistant: ' + message.content | trim + '\\n' }}
  {%- else -%}
    {{ raise_exception('no results of calls in the plain format') }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""

PLAIN_STOPS = ("\nUser:",)
"""Texts that end an answer in the plain format."""

STEP = """
{%- set call_format -%}
<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
{%- endset -%}
{{- bos_token }}
{%- set first = messages[0] if messages else {} -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' }}
  {%- if first.role == 'system' %}{{ first.content + '\\n\\n' }}{% endif -%}
  {{- '# Tools\\n\\nFunctions that can be called, as JSON schemas:\\n\\n<tools>' }}
  {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor -%}
  {{- '\\n</tools>\\n\\nA call is written like this, with every required parameter, and nothing '
      'after it:\\n\\n' + call_format + '<|im_end|>\\n' }}
{%- elif first.role == 'system' -%}
  {{- '<|im_start|>system\\n' + first.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(last_user=messages | length) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {%- set observed = message.role == 'system' and message.name == 'observation' -%}
    {{- '<|im_start|>' + ('observation' if observed else message.role) + '\\n' }}
    {{- message.content + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last_user or preserve_thinking -%}
      {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n' }}
    {%- endif -%}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] -%}
      {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
      {%- for key, value in call.function.arguments | items -%}
        {%- if value is mapping or (value is sequence and value is not string) -%}
          {%- set value = value | tojson -%}
        {%- endif -%}
        {{- '<parameter=' + key + '>\\n' + value | string + '\\n</parameter>\\n' }}
      {%- endfor -%}
      {{- '</function>\\n</tool_call>' }}
    {%- endfor -%}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' -%}
    {%- if loop.previtem is undefined or loop.previtem.role != 'tool' -%}
      {{- '<|im_start|>tool_response\\n' }}
    {%- endif -%}
    {{- '<tool_response>' + message.content + '</tool_response>' }}
    {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' -%}
      {{- '<|im_end|>\\n' }}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif -%}
"""
