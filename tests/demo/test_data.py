"""Scenes and questions: deterministic, true to what is drawn, and with held-out digits really held out."""

import numpy as np

from jeton.demo.backgrounds import PHOTOS
from jeton.demo.data import BACKGROUND, COLOURS, GRID, SIZE, digit_images, make_scene
from jeton.demo.examples import load_examples, write_examples
from jeton.demo.questions import KINDS, all_questions, ask


def _scenes(count, split="held-out", seed=3):
    rng = np.random.default_rng(seed)
    return [make_scene(rng, split) for _ in range(count)]


def test_no_digit_image_is_in_both_splits():
    from sklearn.datasets import load_digits

    (train, _), (held_out, _) = digit_images("train"), digit_images("held-out")
    assert len(train) + len(held_out) == len(load_digits().images)
    # Two of the data set's images could be equal by chance; none are.
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held_out}


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOS["train"]) & set(PHOTOS["held-out"])


def test_a_seed_always_draws_the_same_scenes():
    for first, second in zip(_scenes(5), _scenes(5)):
        assert np.array_equal(first.image, second.image) and first.digits == second.digits


def test_a_digit_owns_patches_inside_its_box_and_nothing_else_does():
    for scene in _scenes(20):
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.owner.shape == (GRID**2,)
        for number, digit in enumerate(scene.digits):
            left, top, right, bottom = digit.box
            rows, columns = np.divmod(np.flatnonzero(scene.owner == number), GRID)
            assert len(rows)
            assert (rows >= top // 7).all() and (rows <= (bottom - 1) // 7).all()
            assert (columns >= left // 7).all() and (columns <= (right - 1) // 7).all()
        assert (scene.owner == BACKGROUND).mean() > 0.4


def test_digits_of_a_scene_have_different_colours_and_do_not_overlap():
    for scene in _scenes(20):
        colours = [digit.colour for digit in scene.digits]
        assert len(set(colours)) == len(colours) and set(colours) <= set(COLOURS)
        assert 2 <= len(scene.digits) <= 5
        centres = np.array([digit.centre for digit in scene.digits])
        apart = np.abs(centres[:, None] - centres[None]).max(-1)[~np.eye(len(centres), dtype=bool)]
        assert apart.min() > 10


def test_every_question_has_one_answer_and_is_known_to_the_vocabulary():
    for scene in _scenes(30):
        questions = ask(scene.digits)
        assert {q.text for q in questions} <= set(all_questions())
        assert {q.kind for q in questions} <= set(KINDS)
        assert len({q.text for q in questions}) == len(questions)


def test_the_stored_scenes_are_what_the_script_draws(tmp_path):
    stored, drawn = load_examples()[:40], write_examples(tmp_path, count=12)[:40]
    for old, new in zip(stored, drawn):
        assert (old.question, old.answer, old.scene, old.boxes) == (new.question, new.answer, new.scene, new.boxes)
        assert np.array_equal(np.asarray(old.image), np.asarray(new.image))
