from pages import script


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    module = script("render_architecture")
    assert module.PICTURE.read_text() == module.drawing(), "run docs/render_architecture.py"
