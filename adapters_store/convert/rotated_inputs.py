"""Block-diagonal rotations of a layer's inputs, `x' = x blocks`: what OFT and BOFT have in common.

Owns the matrices that skew-symmetric ones give, and the same rotations written row by row. Invariant: `cayley` and
`turn_cayley`, `neumann` and `turn_neumann` are written independently of each other, for the conversion's proof.
"""

import numpy as np

from adapters_store.convert.tuner import Float64


def cayley(skew: Float64) -> Float64:
    """Return `(I - S) (I + S)^-1` of every S [n, b, b]; it is orthogonal."""
    eye: Float64 = np.eye(skew.shape[1])
    # X (I + S) = I - S, transposed for the solver
    solved = np.linalg.solve((eye + skew).swapaxes(1, 2), (eye - skew).swapaxes(1, 2)).swapaxes(1, 2)
    return np.asarray(solved, np.float64)


def neumann(skew: Float64, num_terms: int) -> Float64:
    """Return `I + 2 S + 2 S^2 + .. + S^last`, PEFT's shortened series; `last` is at least 3 from three terms on."""
    total = np.repeat(np.eye(skew.shape[1])[None], len(skew), axis=0)
    weights = series(num_terms)
    power = total
    for weight in weights:
        power = power @ skew
        total = total + weight * power
    return total


def series(num_terms: int) -> list[float]:
    """Return the weights of S, S^2, .. in PEFT's series of so many terms."""
    if num_terms <= 1:
        return []
    if num_terms == 2:
        return [2.0]
    return [2.0] * max(2, num_terms - 2) + [1.0]


def turn_cayley(x: Float64, skew: Float64) -> Float64:
    """Return x [T, n * b] turned: the solution z of `z (I + S) = x (I - S)`, block by block."""
    size = skew.shape[1]
    turned = np.empty_like(x)
    for block, each in enumerate(skew):
        part = slice(block * size, (block + 1) * size)
        turned[:, part] = np.linalg.lstsq((np.eye(size) + each).T, (x[:, part] - x[:, part] @ each).T, rcond=None)[0].T
    return turned


def turn_neumann(x: Float64, skew: Float64, num_terms: int) -> Float64:
    """Return x [T, n * b] turned: x itself, twice x S, twice x S^2 and so on, the last one once."""
    size = skew.shape[1]
    turned = x.copy()
    last = max(3, num_terms - 1) if num_terms > 2 else num_terms - 1
    for block, each in enumerate(skew):
        part = slice(block * size, (block + 1) * size)
        moved = x[:, part]
        for power in range(1, last + 1):
            moved = moved @ each
            turned[:, part] += moved if power == last and num_terms > 2 else 2 * moved
    return turned
