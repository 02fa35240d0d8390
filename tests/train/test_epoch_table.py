"""The epoch table: overfitting pointed out, the best epoch marked, in text and in HTML."""

import pytest

from jaxcats.train.epoch_table import Table, best_epoch, overfitting, to_html


def rows(*triples):
    return [
        {
            "phase": "<head>",
            "epoch": i,
            "train_loss": train,
            "valid_loss": valid,
            "errors": errors,
            "n": 100,
            "interval": [0.9, 1.0],
            "seconds": 1.0,
            "images_per_second": 10.0,
        }
        for i, (train, valid, errors) in enumerate(triples)
    ]


LESSON = rows((0.0496, 0.0261, 2), (0.0398, 0.0292, 1), (0.0337, 0.0293, 2))  # fast.ai 2018, lesson 1


def test_overfitting_is_a_validation_loss_that_has_turned_up_while_the_training_loss_falls():
    assert "lowest after epoch 0 (0.0261) and is now 0.0293" in overfitting(LESSON)


@pytest.mark.parametrize(
    "triples",
    [
        [(0.5, 0.3, 3)],
        [(0.5, 0.3, 3), (0.4, 0.2, 3)],  # still falling
        [(0.5, 0.347, 3), (0.4, 0.357, 3), (0.3, 0.36, 3)],  # a small rise
        [(0.5, 0.2, 3), (0.6, 0.3, 3)],  # the training loss rose too: diverging, not overfitting
        [(0.5, 0.2, 3), (0.4, 0.3, 3), (0.3, 0.1, 3)],  # it came down again
    ],
)
def test_and_nothing_else(triples):
    assert overfitting(rows(*triples)) is None


def test_the_best_epoch_has_the_fewest_errors_then_the_lowest_loss():
    assert best_epoch(LESSON) == 1
    assert best_epoch(rows((1, 0.3, 5), (1, 0.2, 5), (1, 0.2, 5))) == 1


def test_the_text_table_has_one_head_and_a_note_per_phase():
    said = []
    table = Table(said.append)
    for _ in range(2):
        for row in LESSON:
            table.add(row)
        table.end()
    assert len(said) == 1 + 2 * (3 + 1)
    assert said[4] == said[8]
    assert said[4].startswith("Overfitting: ")
    assert said[4].endswith("Fewest errors after epoch 1: 1.")


def test_html_marks_the_best_and_escapes_what_users_name():
    text = to_html(LESSON, best=1, note="a < b")
    assert text.count("<tr") == 4
    assert text.count("font-weight: bold") == 1
    assert "1 error of 100" in text.split("font-weight: bold")[1].split("</tr>")[0]
    assert "&lt;head&gt;" in text
    assert "<head>" not in text
    assert "a &lt; b" in text
