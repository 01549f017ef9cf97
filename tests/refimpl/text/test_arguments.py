"""Raw argument text to the declared types; what does not fit stays text and is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import InputError
from refimpl.text.arguments import coerce
from refimpl.text.tools import Tools

GOOD = [
    ("string", "42", "42"),
    ("string", "null", "null"),
    ("str", " a\nb ", " a\nb "),
    ("integer", "42", 42),
    ("integer", " -7 ", -7),
    ("int", "3.0", 3),
    ("number", "3.5", 3.5),
    ("number", "4", 4),
    ("float", "1e3", 1000.0),
    ("boolean", "True", True),
    ("bool", "false", False),
    ("null", "null", None),
    ("object", '{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
    ("object", "{'a': True, 'b': None}", {"a": True, "b": None}),
    ("array", "[1, 'x']", [1, "x"]),
    ("array", "(1, 2)", [1, 2]),
    (["string", "null"], "null", None),
    (["integer", "string"], "12", 12),
    (["integer", "string"], "12 apples", "12 apples"),
    (["number", "integer"], "12", 12),
]


@pytest.mark.parametrize(("kind", "text", "value"), GOOD)
def test_text_becomes_the_declared_type(kind, text: str, value) -> None:
    found, problem = coerce(text, {"type": kind})
    assert (found, problem) == (value, None)
    assert type(found) is type(value)


BAD = [
    ("integer", "four"),
    ("integer", "3.5"),
    ("integer", "9" * 5000),
    ("number", "nan"),
    ("number", "1e999"),
    ("number", "٣"),
    ("boolean", "yes"),
    ("object", "[1]"),
    ("object", '{"a": NaN}'),
    ("object", "{'a'"),
    ("object", "__import__('os')"),
    ("object", "[" * 100_000),
    ("array", "{1, 2}"),
    ("array", "[b'x']"),
    (["integer", "null"], "x"),
]


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_what_does_not_fit_stays_text_and_is_named(kind, text: str) -> None:
    found, problem = coerce(text, {"type": kind})
    assert found == text
    assert problem is not None and "is not of type" in problem and len(problem) < 120


def test_types_are_found_through_unions_references_and_nullable() -> None:
    root = {"$defs": {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert coerce("5", {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/count"}]}, root) == (5, None)
    assert coerce("5", {"$ref": "#/$defs/loop"}, root) == ("5", None)
    assert coerce("null", {"type": "integer", "nullable": True}) == (None, None)
    assert coerce("5", {"$ref": "#/nowhere"}, root) == ("5", None)
    assert coerce("5", {}) == ("5", None)
    assert coerce("2", {"enum": [1, 2, "3"]}) == (2, None)
    assert coerce("3", {"enum": [1, 2, "3"]}) == ("3", None)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))  # fmt: skip
def test_json_values_survive_the_way_through_text(value) -> None:
    """As the template writes them: objects and arrays as JSON, text as it is."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object",
             list: "array", type(None): "null"}  # fmt: skip
    text = value if isinstance(value, str) else json.dumps(value)
    assert coerce(text, {"type": kinds[type(value)]}) == (value, None)


def test_calls_name_what_does_not_fit_the_definition() -> None:
    schema = {"properties": {"n": {"type": "integer"}, "s": {}}, "required": ["n", "s"]}
    tools = Tools([{"name": "f", "parameters": schema}])
    made = tools.call("f", [("n", "x"), ("other", "1")])
    assert made.arguments == {"n": "x", "other": "1"}
    assert made.problems == (
        "'n': 'x' is not of type integer",
        "'f' has no parameter 'other'",
        "the required parameter 's' is missing",
    )
    assert tools.call("g", []).problems == ("there is no tool 'g' (there are: f)",)
    assert tools.call("f", [("n", "1"), ("n", "2"), ("s", "")]).arguments["n"] == 2
    assert Tools().call("f", [("n", "1")]).problems == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "expected a JSON list"),
        ("[3]", "tool 0 has no name"),
        ('[{"function": {}}]', "tool 0 has no name"),
        ('[{"name": "a"}, {"name": "a"}]', "'a' is defined twice"),
        ('[{"name": "a", "parameters": []}]', "are not a JSON schema"),
    ],
)
def test_bad_definitions_are_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tools.from_json(text, "tools.json")


WORDS = ["type", "anyOf", "$ref", "enum", "properties", "required", "a", "#/a", "integer", "array"]
ANYTHING = st.recursive(
    st.none() | st.integers() | st.sampled_from(WORDS),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(WORDS), x, max_size=4),
    max_leaves=12,
)


@given(schema=st.dictionaries(st.sampled_from(WORDS), ANYTHING), text=st.text(max_size=9))
def test_no_schema_is_strange_enough_to_fail(schema, text: str) -> None:
    tools = Tools([{"name": "f", "parameters": schema}])
    for name in ("f", "g"):
        assert set(tools.call(name, [("a", text), ("type", "[1")]).arguments) == {"a", "type"}
