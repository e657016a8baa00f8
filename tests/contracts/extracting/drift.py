"""What changed from one release to another."""

from __future__ import annotations

from collections.abc import Iterator

from tests.contracts.extracting.stored import Json, known, load_raw, version_key


def drift(before: Json, after: Json) -> list[str]:
    """What changed, one line each: `-` gone, `+` new, `~` different."""
    old, new = dict(_facts_by_name(before)), dict(_facts_by_name(after))
    lines = [f"- {name}" for name in sorted(old.keys() - new.keys())]
    lines += [f"+ {name}: {new[name]}" for name in sorted(new.keys() - old.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [f"~ {name}: {old[name]} -> {new[name]}" for name in both if old[name] != new[name]]


def _facts_by_name(facts: Json) -> Iterator[tuple[str, str]]:
    """Every fact as what it is about and what it says. Imports are left out: they say little."""
    for variable in facts["envs"]["variables"]:
        yield f"variable {variable}", "read by vLLM"
    if facts["envs"]["enable_envs_cache"]:
        yield "function vllm.envs:enable_envs_cache", "()"
    for module, content in facts["modules"].items():
        if content is None:
            continue
        yield f"module {module}", "there"
        for name, origin in content.get("aliases", {}).items():
            yield f"alias {module}:{name}", origin
        for name, function in content.get("functions", {}).items():
            yield f"function {module}:{name}", _one_line(function)
        for class_name, cls in content.get("classes", {}).items():
            yield from _class_by_name(f"{module}:{class_name}", cls)


def _class_by_name(where: str, cls: Json) -> Iterator[tuple[str, str]]:
    yield f"class {where}", f"{cls['kind']}({', '.join(cls['bases'])})"
    for kind, key in (("field", "fields"), ("attribute", "attributes")):
        for field in cls.get(key, ()):
            default = f" = {field['default']}" if "default" in field else ""
            yield f"{kind} {where}.{field['name']}", f"{field.get('annotation', '')}{default}".strip()
    for name, annotation in cls.get("properties", {}).items():
        yield f"property {where}.{name}", annotation or "untyped"
    for name, method in cls.get("methods", {}).items():
        yield f"method {where}.{name}", _one_line(method)
    for name, value in cls.get("members", {}).items():
        yield f"member {where}.{name}", repr(value)
    for name, value in cls.get("calls", {}).items():
        if name != "stat_calls":
            yield f"calls {where} {name}", str(value)
            continue
        for call in value:
            yield f"calls {where}.{call['in']} -> {call['call']}({', '.join(call['arguments'])})", "there"


def _one_line(method: Json) -> str:
    return " ".join([*sorted(key for key in method if method[key] is True), method["signature"]])


def report(facts: Json) -> None:
    """Print the drift against the newest stored release that is older."""
    try:
        older = [name for name in known() if version_key(name) < version_key(facts["release"])]
    except ValueError:
        older = known()
    if not older:
        print(f"{facts['release']} ({facts['source']}): nothing older to compare with")
        return
    changes = drift(load_raw(older[-1]), facts)
    print(f"{facts['release']} ({facts['source']}) against {older[-1]}: {len(changes) or 'no'} changes")
    for change in changes:
        print("  " + change)
