"""Records the token ids that llama.cpp gives for mixed-script text.

    python tests/golden/make_tokenizer.py

Needs llama-cpp-python (the `oracles` extra). Trains a small byte-level BPE with the family's
pre-tokenizer on the text below, writes it into a GGUF file, lets llama.cpp tokenize the cases,
and writes tests/golden/tokenizer.json: the tokenizer, and per case the ids with and without
reading special tokens.

A wider comparison, too slow for a fixture: every code point of the first two Unicode planes in
four surroundings (516,092 strings) gave the same ids in both programs, but for 80 digits that
Unicode 16 added in 2024 (such as U+10D40).
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VOCABULARY = 1024
SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
)
ORDINARY = ("<fim>",)  # an added token that is not special: read in any text

SCRIPTS = {
    "latin": "The model reads its window and answers; naïve façade, Größe, Łódź, İstanbul, ﬁn. ",
    "cjk": "模型读取窗口并回答问题。東京タワーへ行きました。ひらがなカタカナ、한국어 문장도 있다。",
    "arabic": "يقرأ النموذج النافذة ويجيب عن السؤال، ١٢٣٤٥ مرة. עברית גם כן. ",
    "cyrillic": "Модель читает окно и отвечает. Ελληνικά επίσης. हिन्दी में भी, १२३। ไทยด้วย ",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇫🇷 🙂🙂 ❤️ ☂ ¯\\_(ツ)_/¯ ",
    "combining": "e\u0301a\u0300o\u0308 q\u0323\u0307 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ ",
    "digits": "0 12 123 1234 12345678901 3.14159 1e-5 0x7f ½ ² Ⅷ ٣٤٥ १२३४५ 𝟘𝟙 ",
    "code": "def f(x):\n\tif x != 0:\n\t\treturn {'k': [x**2, -1]}\r\n    # 注释\n\n\n"
    "@a.b\nclass C: ...\n",
    "spaces": " a  b   c\t\td \n e\u00a0f\u3000g\u2028h\u200bi\u202fj\u0085k\ufeffl   \n\n  \r\n ",
    "control": "\x01\x02a\x07b\x1b[31mred\x1b[0m\x7f\x1c\x1f \x0b\x0c end ",
    "marks": "--> !!! ??? «quoted» “smart” ‹…› €£¥ ©®™ §¶ ~~~ $$$ ^^^ a_b.c-d/e\\f 'it''s' it's ",
    "special": "<|im_start|>user\nhi<|im_end|> <think>x</think> <fim>y<|im_end "
    "<|im_start|><|im_end|>",
}
HARD = [
    *("", " ", "\n", "\t", "\ufffd", "\U0010ffff", "\ue000", "\u0378"),
    *("a" * 300, " " * 65, "\n" * 9, "\r\r\n\n", "…\n\n", "?\n!\r\n"),
    *("I'll don't we've", "x=y+1;z", "  leading", "trailing  "),
    *(
        "A\u0301\u0301B",
        "1\u0301",
        "_\u0301",
        "中a文b字",
        "ー々〆",
        "\u3400\u4e00\U00020000",
        "𝓗𝓮𝓵𝓵𝓸",
    ),
]


def main() -> None:
    import llama_cpp

    from refimpl.text.tokenizer import tokenizer_of

    data = train()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gguf = write_model(folder, data)
        ours = tokenizer_of(folder / "model")
        theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)

        def ids(text: str, special: bool) -> list[int]:
            return list(theirs.tokenize(text.encode(), add_bos=False, special=special))

        found = [{"text": t, "ids": ids(t, True), "plain": ids(t, False)} for t in cases()]
    differing = sum(ours.encode(c["text"]) != c["ids"] for c in found)
    out = HERE / "tokenizer.json"
    header = {"by": f"llama-cpp-python {llama_cpp.__version__}", "cases": found, "tokenizer": data}
    out.write_text(json.dumps(header, ensure_ascii=True, separators=(",", ":")) + "\n")
    size = out.stat().st_size
    print(f"{len(found)} cases, {differing} differ; {out.name} {size} bytes", file=sys.stderr)


def train() -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from refimpl.text.pretokenizer import build_pre_tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = build_pre_tokenizer("deepseek-v3", "here")
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ORDINARY),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(list(SCRIPTS.values()) * 3, trainer)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in ORDINARY])
    data: dict[str, Any] = json.loads(bpe.to_str())
    return data


def write_model(folder: Path, data: dict[str, Any]) -> Path:
    from refimpl.checkpoint.convert import convert
    from refimpl.checkpoint.synth import synthesize, tiny_a

    config = dataclasses.replace(tiny_a(), vocab_size=VOCABULARY + 32)
    synthesize(config, 0, folder / "model")
    (folder / "model" / "tokenizer.json").write_text(json.dumps(data))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    convert(folder / "model", folder / "model.gguf", "q8_0")
    return folder / "model.gguf"


def cases() -> list[str]:
    rng = random.Random(7)
    texts = [*SCRIPTS.values(), *HARD]
    letters = "".join(SCRIPTS.values())
    for _ in range(60):
        texts.append("".join(rng.choices(letters, k=rng.randint(1, 40))))
    for _ in range(60):
        parts = [rng.choice(list(SCRIPTS.values())) for _ in range(3)]
        cuts = [(p, rng.randrange(len(p)), rng.randint(1, 12)) for p in parts]
        texts.append("".join(p[a : a + n] for p, a, n in cuts))
    for _ in range(40):  # any code point, surrogates and NUL excepted
        low, high = rng.choices(range(1, 0xD800), k=4), rng.choices(range(0xE000, 0x10D40), k=4)
        texts.append("".join(map(chr, rng.sample(low + high, 8))))
    return texts


if __name__ == "__main__":
    main()
