"""Parameters by path are the tree, scanned or not."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxpref.models import decoder, paths
from jaxpref.models.decoder import DecoderConfig

CONFIG = DecoderConfig(11, 8, 2, 2, 1, 4, 12, tied=False)


def random_arrays(config):
    shapes = paths.shapes(decoder.abstract(config)[1], config.layers)
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def test_paths_and_shapes_by_hand():
    shapes = paths.shapes(decoder.abstract(CONFIG, scan=True)[1], CONFIG.layers)
    assert shapes["embedding"] == shapes["unembedding"] == (11, 8)
    assert shapes["layers.1.attention.key.kernel"] == (8, 4)
    assert shapes["layers.0.mlp.down.kernel"] == (12, 8)
    assert shapes["norm.scale"] == (8,)
    assert len(shapes) == 3 + 2 * 9


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("scan", [False, True])
def test_flattening_undoes_unflattening(scan, layers):
    config = dataclasses.replace(CONFIG, layers=layers)
    params, arrays = decoder.abstract(config, scan=scan)[1], random_arrays(config)
    tree = paths.unflatten(params, arrays, layers)
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, params)
    found = paths.flatten(tree, layers)
    assert found.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, found, arrays)


def test_a_scanned_tree_is_the_other_stacked():
    arrays = random_arrays(CONFIG)
    plain, scanned = (
        paths.unflatten(decoder.abstract(CONFIG, scan=scan)[1], arrays, CONFIG.layers)
        for scan in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, decoder.stack_layers(plain), scanned)
