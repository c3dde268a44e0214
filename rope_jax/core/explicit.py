"""Programs on meshes of explicit axes: XLA divides the program, and its results get the types that are named.

On a mesh of explicit axes (``AxisType.Explicit``, the default of :func:`jax.make_mesh`), the type of an array says
how it is divided. JAX raises an error if the type of a result does not follow from its operands: of a product over
a divided axis, a gather or a scatter.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*operands) -> AbstractMesh | None:
    """The mesh in use, or the mesh of the operands' types, if it has explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands))
        mesh = next((each for each in meshes if each.explicit_axes), mesh)
    return mesh if mesh.explicit_axes else None


def spec_of(x) -> PartitionSpec:
    """The mesh axes of each axis of x, by its type: None for an axis that is not divided."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


def by_xla(program: Callable, specs) -> Callable:
    """The program with automatic axes in place of explicit axes: XLA divides it, and places results by ``specs``.

    Args:
      program: a function of pytrees of arrays, which must not close over arrays.
      specs: of the results: a :class:`jax.sharding.PartitionSpec`, a pytree of these, or a function from the
        results to such a pytree.
    """

    def divided(*operands):
        if not (mesh := explicit_mesh(*operands)):
            return program(*operands)
        automatic = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(automatic):
            results = program(*jax.sharding.reshard(operands, PartitionSpec()))
        of_results = specs(results) if callable(specs) else specs
        return jax.sharding.reshard(results, jax.tree.map(lambda spec: NamedSharding(mesh, spec), of_results))

    return divided


def dense_options(dot_general: Callable | None = None) -> dict[str, Any]:
    """Fields ``dot_general`` and ``promote_dtype`` of a dense layer of flax, for any mesh."""
    return dict(dot_general=placed_product(dot_general), promote_dtype=promoted_beside)


def promoted_beside(x, kernel, bias, **options):
    """x, kernel and bias in one dtype; the bias lies beside x."""
    return promote_dtype(x, kernel, None if bias is None else beside(x, bias), **options)


def beside(x, parameter) -> jax.Array:
    """The parameter, gathered along the mesh axes that divide x: for a sum or product with x."""
    if not (mesh := explicit_mesh(x, parameter)):
        return parameter
    spec = without_repeats(*spec_of(x), *spec_of(parameter))[x.ndim :]
    return jax.sharding.reshard(parameter, NamedSharding(mesh, PartitionSpec(*spec)))


def placed_product(dot_general: Callable | None = None) -> Callable:
    """``dot_general`` (:func:`jax.lax.dot_general` by default) of activations and a kernel.

    The result is divided as the activations, and along the features of the kernel that the activations leave free:
    a sum over a divided axis is completed, and a kernel that shares a mesh axis with the rows is gathered.
    """
    dot_general = dot_general or lax.dot_general

    def placed(x, kernel, dimension_numbers, *arguments, **options):
        if not explicit_mesh(x, kernel):
            return dot_general(x, kernel, dimension_numbers, *arguments, **options)

        def multiply(x, kernel, of_layer):
            return dot_general(x, kernel, dimension_numbers, *arguments, **(options | of_layer))

        # by_xla hands on another array than this kernel, by which LayerProduct finds no stack.
        of_layer = dot_general.stack_of(kernel) if hasattr(dot_general, "stack_of") else {}
        return by_xla(multiply, _product_spec(x, kernel, dimension_numbers))(x, kernel, of_layer)

    return placed


def _product_spec(x, kernel, dimension_numbers) -> PartitionSpec:
    (x_axes, kernel_axes), (x_batch, kernel_batch) = dimension_numbers
    x_spec, kernel_spec = spec_of(x), spec_of(kernel)
    rows = [x_spec[axis] for axis in x_batch]
    rows += [entry for axis, entry in enumerate(x_spec) if axis not in (*x_axes, *x_batch)]
    features = [entry for axis, entry in enumerate(kernel_spec) if axis not in (*kernel_axes, *kernel_batch)]
    return PartitionSpec(*without_repeats(*rows, *features))


def is_divisible(rows, axes) -> bool:
    """Whether an entry of a spec, mesh axes or None, divides the first axis of ``rows``."""
    mesh = explicit_mesh(rows)
    names = axes if isinstance(axes, tuple) else (axes,)
    return mesh is None or rows.shape[0] % math.prod(mesh.shape[name] for name in names if name) == 0


def without_repeats(*entries) -> list:
    """Entries of a spec in which no mesh axis comes again: the first entry keeps it."""
    kept, used = [], set()
    for entry in entries:
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(name for name in names if name is not None and name not in used)
        used |= set(names)
        kept.append(names[0] if len(names) == 1 else names or None)
    return kept
