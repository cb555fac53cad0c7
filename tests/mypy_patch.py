"""A plugin of mypy: what stands under fastcore's `@patch` is a method of the class that its first parameter names."""
import time

from mypy.nodes import CallExpr, ClassDef, Decorator, NameExpr
from mypy.plugin import Plugin
from mypy.types import AnyType, TypeOfAny, UnboundType


def patch_of(node):
    "The `@patch` above a function, with its options or without; None for none."
    if not isinstance(node, Decorator): return None
    named = lambda d: isinstance(d, NameExpr) and d.name == "patch"
    return next((d for d in node.decorators if named(d.callee if isinstance(d, CallExpr) else d)), None)


def owner(node, classes):
    "The class of this file that a patched function belongs to."
    kind = node.func.arguments[0].type_annotation
    return classes.get(kind.name) if isinstance(kind, UnboundType) else None


def without_self(function):
    "Take the class away from a class method's first parameter, where it stands for its instances."
    function.arguments[0].type_annotation = None
    for name in ("type", "unanalyzed_type"):
        whole = getattr(function, name)
        setattr(function, name, whole.copy_modified(arg_types=[AnyType(TypeOfAny.unannotated), *whole.arg_types[1:]]))


def put(node, patch, kind):
    "Make a function a method; `as_prop` makes it a property, `cls_method` a class method."
    node.decorators.remove(patch)
    names = {"as_prop": "property", "cls_method": "classmethod"}
    given = patch.arg_names if isinstance(patch, CallExpr) else ()
    for name in (names[option] for option in given if option in names):
        made = NameExpr(name)
        made.set_line(node)
        node.decorators.append(made)
    node.original_decorators = [*node.decorators]
    node.func.is_decorated = bool(node.decorators)
    if "cls_method" in given: without_self(node.func)
    kind.defs.body.append(node if node.decorators else node.func)


class Patched(Plugin):
    def get_additional_deps(self, file):
        "Called for each file when it has been read, before anything is looked up in it."
        if file.fullname.startswith("medllm."):
            classes = {node.name: node for node in file.defs if isinstance(node, ClassDef)}
            for node in [*file.defs]:
                if (patch := patch_of(node)) and (kind := owner(node, classes)):
                    file.defs.remove(node)
                    put(node, patch, kind)
        return []

    def report_config_data(self, file):
        "Never the same for a file of ours, so that it is read each time: out of mypy's cache it would come without its methods."
        return time.perf_counter_ns() if file.id.startswith("medllm.") else None


def plugin(version): return Patched
