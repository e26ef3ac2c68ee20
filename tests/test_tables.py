"""Images in the columns of a table: pandas and scikit-learn keep rows and labels together."""

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from small import SMALL, pictures, small

from fungi_core import Fungi

INDEX = [7, 3, 0, 9, 1, 5]  # a lookup by label would give other images, or none


def transformer(**settings):
    return Fungi(small(), SMALL[:1], **{"pca": None} | settings)


@pytest.fixture(scope="module")
def expected():
    return transformer().fit_transform(pictures(6))


def series(index=INDEX) -> pd.Series:
    return pd.Series(pictures(6), index=index)


def frame() -> pd.DataFrame:
    return pd.DataFrame({"image": series(), "length": np.arange(6.0)}, index=INDEX)


@pytest.mark.parametrize("index", [INDEX, [0, 0, 1, 1, 2, 2], list("fedcba"), None])
def test_a_series_counts_by_rows_whatever_its_index(index, expected):
    np.testing.assert_array_equal(transformer().fit_transform(series(index)), expected)


def test_the_negatives_of_a_series_are_those_of_a_list():
    made = lambda x: Fungi(small(), SMALL[2:], pca=None).fit(x).parts_["simclr"].negatives
    np.testing.assert_array_equal(made(series()), made(pictures(6)))


def test_part_of_a_series_and_paths_in_one(expected, tmp_path):
    one = transformer().fit(series())
    few = series().iloc[[4, 1]]
    np.testing.assert_allclose(one.transform(few), expected[[4, 1]], rtol=0, atol=1e-5)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, pictures(6), strict=True):
        image.save(path)
    named = pd.Series(map(str, paths), index=INDEX)
    np.testing.assert_array_equal(one.transform(named), expected)


def test_a_frame_of_one_column_and_an_array_of_objects(expected):
    one = transformer().fit(frame()[["image"]])
    np.testing.assert_array_equal(one.transform(frame()[["image"]]), expected)
    array = np.empty((6, 1), object)
    array[:, 0] = pictures(6)
    np.testing.assert_array_equal(one.transform(array), expected)
    np.testing.assert_array_equal(one.transform(array[:, 0]), expected)


def test_more_columns_and_no_rows_are_one_line():
    with pytest.raises(ValueError, match="X is a table of 2 columns; it must have one, of images"):
        transformer().fit(frame())
    for empty in (series().iloc[:0], frame()[["image"]].iloc[:0]):
        with pytest.raises(ValueError, match="X holds no image"):
            transformer().fit(empty)


@pytest.mark.parametrize("column", ["image", ["image"]])
def test_a_column_transformer_puts_each_feature_into_its_images_row(column, expected):
    columns = [("fungi", transformer(), column), ("rest", "passthrough", ["length"])]
    found = ColumnTransformer(columns).fit_transform(frame())
    np.testing.assert_array_equal(found[:, :-1].astype(np.float32), expected)
    np.testing.assert_array_equal(found[:, -1], np.arange(6))


def test_a_column_transformer_gives_a_frame_with_the_rows_names(expected):
    columns = ColumnTransformer([("fungi", transformer(), ["image"])])
    found = columns.set_output(transform="pandas").fit_transform(frame())
    assert found.index.tolist() == INDEX and found.columns[0] == "fungi__fungi0"
    np.testing.assert_array_equal(found.to_numpy(), expected)


def test_a_pipeline_trains_on_the_right_labels():
    """Dark and bright images in turn, the table shuffled: its labels are found again, also by
    cross-validation, which takes parts of a Series by place.
    """
    rng, labels = np.random.default_rng(0), np.arange(12) % 2
    images = [
        rng.integers(150 * label, 150 * label + 100, (36, 40, 3), dtype=np.uint8)
        for label in labels
    ]
    table = pd.DataFrame({"image": pd.Series(images), "label": labels})
    table = table.sample(frac=1, random_state=1)
    assert table.index.tolist() != list(range(12))
    model = make_pipeline(transformer(pca=2), KNeighborsClassifier(1))
    model.fit(table["image"], table["label"])
    np.testing.assert_array_equal(model.predict(images), labels)
    found = cross_val_predict(model, table["image"], table["label"], cv=3)
    np.testing.assert_array_equal(found, table["label"])
    by_columns = ColumnTransformer([("fungi", transformer(), "image")])
    whole = make_pipeline(by_columns, KNeighborsClassifier(1)).fit(table[["image"]], table["label"])
    np.testing.assert_array_equal(whole.predict(table[["image"]]), table["label"])
