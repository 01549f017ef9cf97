"""Record chat prompts as transformers renders them: `python tests/golden/make_chat.py TEMPLATE`.

TEMPLATE is the published chat template of Step 3.5 Flash (as llama.cpp ships it:
models/templates/StepFun3.5-Flash.jinja). The conversations of `chat_cases.py` are rendered with it
by transformers' `apply_chat_template`. chat.json then holds, per conversation, the sha256 of the
whole prompt and the prompt without the system block's tool instructions, which are StepFun's words:
the built-in template `step` must give the same but for those. With the template at hand, our own
renderer is compared with transformers on it, every byte. The built-in templates are rendered by
transformers too, and recorded by their hashes.
"""

import hashlib
import json
import sys
from pathlib import Path

import transformers
from chat_cases import CASES, without_instructions
from transformers.utils.chat_template_utils import render_jinja_template

from refimpl.text.builtin import PLAIN, STEP
from refimpl.text.template import ChatTemplate

BOS = "<s>"


def by_transformers(source: str, case: dict) -> str:
    rendered, _ = render_jinja_template(
        conversations=[case["messages"]],
        tools=case.get("tools"),
        chat_template=source,
        add_generation_prompt=case["generation"],
        bos_token=BOS,
        **case.get("variables", {}),
    )
    return rendered[0]


def by_us(source: str, case: dict) -> str:
    with ChatTemplate(source, "template", {"bos_token": BOS}) as template:
        return template.render(
            messages=case["messages"],
            tools=case.get("tools"),
            add_generation_prompt=case["generation"],
            **case.get("variables", {}),
        )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(path: str) -> None:
    published = Path(path).read_text()
    record: dict = {
        "command": "python tests/golden/make_chat.py StepFun3.5-Flash.jinja",
        "transformers": transformers.__version__,
        "template_sha256": digest(published),
        "cases": {},
    }
    equal = 0
    for name, case in CASES.items():
        theirs = by_transformers(published, case)
        if by_us(published, case) != theirs:
            raise SystemExit(f"{name}: our renderer and transformers differ on {path}")
        equal += 1
        entry = {
            "published_sha256": digest(theirs),
            "published_without_instructions": without_instructions(theirs),
            "step_sha256": digest(by_transformers(STEP, case)),
        }
        if case.get("plain", False):
            entry["plain"] = by_transformers(PLAIN, case)
        record["cases"][name] = entry
    out = Path(__file__).with_name("chat.json")
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{equal} of {len(CASES)} prompts equal, byte for byte; wrote {out.name}")


if __name__ == "__main__":
    main(sys.argv[1])
