"""A page for every public module, and docstrings read as the plain text they are."""

import importlib
import pkgutil
import re
import sys

from sphinx.util.nodes import make_refnode

PACKAGES = ("mamba_fast", "mamba_ref")
# An op's README tells how it works inside: the rooms in its folder are not for import from elsewhere.
INTERNAL = re.compile(r"mamba_fast\.(nvrtc\w*|ops|ops\.rooms|ops\.\w+\.\w+)|.*\.(_\w+|__main__)")
LITERAL = re.compile(r"(`+[^`]*`+)")
MARKUP = re.compile(r"[*|]|(?<=\w)_(?!\w)")
PARAMETER = re.compile(r"\*{0,2}\w+(, \*{0,2}\w+)* : ")
SECTIONS = ("Parameters", "Returns", "Raises", "Attributes")


def write(folder):
    """A page for each package, which leads to a page for each of its modules."""
    folder.mkdir()
    for package in PACKAGES:
        head = [*title(package), f".. automodule:: {package}"]
        if package == "mamba_fast":  # its names are documented where people import them from
            head.append("   :members:")
            seen = [*members(package).values()]
        else:  # a function has the name of its module, so that each is documented in its module
            head += ["", *(f"* :py:obj:`{name}`" for name in members(package))]
            seen = []
        pages = write_modules(folder, modules(package), seen)
        short = {name: name.removeprefix(f"{package}.") for name in sorted(pages)}
        tree = [f"   {text} <{name}>" for name, text in short.items()]
        about = [f"* :doc:`{text} <{name}>` {first_line(name)}" for name, text in short.items()]
        lines = [*head, "", *title("Modules", "-"), *about, "", ".. toctree::", "   :hidden:", "", *tree]
        (folder / f"{package}.rst").write_text("\n".join(lines) + "\n", "utf-8")


def write_modules(folder, names, seen):
    """Pages of the modules that have something which is not in `seen`; the names of these modules.

    What a package exports is documented there, other things where they are defined.
    """
    pages = []
    for name in sorted(names, key=lambda name: name.count(".")):
        found, others = members(name), {*names} - {name}
        if hasattr(importlib.import_module(name), "__path__"):
            others = ()
        elsewhere = [
            n
            for n, value in found.items()
            if any(value is other for other in seen) or getattr(value, "__module__", name) in others
        ]
        seen += [value for n, value in found.items() if n not in elsewhere]
        if len(elsewhere) < len(found) or not found:
            pages.append(name)
            lines = [*title(name), f".. automodule:: {name}", "   :members:"]
            lines += [f"   :exclude-members: {', '.join(elsewhere)}"] * bool(elsewhere)
            (folder / f"{name}.rst").write_text("\n".join(lines) + "\n", "utf-8")
    return pages


def title(text, line="="):
    return [text, line * len(text), ""]


def first_line(name):
    return unmarked((importlib.import_module(name).__doc__ or "").partition("\n")[0])


def modules(package):
    """Names of the public modules of a package, without itself."""
    path = importlib.import_module(package).__path__
    names = [item.name for item in pkgutil.walk_packages(path, f"{package}.")]
    return [name for name in names if not INTERNAL.fullmatch(name)]


def members(name):
    """What a module offers: __all__, or the functions and classes that it defines."""
    module = importlib.import_module(name)
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == name]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
    return {n: getattr(module, n) for n in names}


def fields(app, what, name, obj, skip, options):
    """The fields of a named tuple have no words of their own: its docstring tells them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def plain(app, what, name, obj, options, lines):
    """Outside backticks nothing is markup, but for the sections of numpydoc.

    An indented block behind a colon is code; any other line that hangs goes on with the line above it.
    """
    given, text, section, code = with_heading(lines), [], False, False
    for place, line in enumerate(given):
        below, far = [*given[place + 1 : place + 3], "", ""][:2]
        if below and set(below) == {"-"}:
            section = line in SECTIONS
        code = code and (not line or line.startswith("    "))
        if code or not line.startswith("    ") or not text or not text[-1]:
            opens = line.endswith(":") and not below and far.startswith("    ")
            text.append(line if code else unmarked(line) + ":" * opens)
            code = code or opens
        elif section and " : " not in text[-1]:  # what numpydoc itself puts below a name or a type
            text.append(unmarked(line))
        else:
            text[-1] += " " + unmarked(line.strip())
    lines[:] = text


def with_heading(lines):
    """Parameters that are a paragraph of their own get their heading, and what follows them one too."""
    starts = [n for n, line in enumerate(lines) if n and not lines[n - 1] and PARAMETER.match(line)]
    if not starts or "Parameters" in lines:
        return lines
    start = starts[0]
    end = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    entries = []
    for line in lines[start:end]:
        if PARAMETER.match(line):
            entries.append(line)
        else:
            entries[-1] += " " + line.strip()
    after = lines[end + 1 :]
    if any(after) and "Notes" not in lines and after[1:2] != ["-" * len(after[0])]:
        after = ["Notes", "-----", *after]
    return [*lines[:start], "Parameters", "----------", *entries, "", *after]


def unmarked(line):
    parts = LITERAL.split(line)
    parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def resolve(app, env, node, content):
    """A name without its module, or with a package that exports it: the one of that name in the package.

    A name that exists and has no page of its own stays text.
    """
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.domains["py"]
    package = (target if "." in target else node.get("py:module") or "").partition(".")[0]
    last, kinds = target.split(".")[-1], domain.objtypes_for_role(node["reftype"])
    found = {
        (entry.docname, entry.node_id)
        for name, entry in domain.objects.items()
        if entry.objtype in kinds and name.split(".")[-1] == last and name.split(".")[0] == package
    }
    if len(found) == 1:
        page, anchor = found.pop()
        return make_refnode(app.builder, node["refdoc"], page, anchor, content, target)
    loaded = [module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES]
    return content if any(hasattr(module, last) for module in loaded) else None
