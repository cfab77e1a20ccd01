"""What the tests of the rehearsal have in common."""

from rehearsal import checks


class Recorded(checks.Stage):
    """A stage whose scenes have run: (name, mode): what came of them."""

    def __init__(self, backend, **scene):
        super().__init__({}, backend)
        object.__setattr__(self, "scene", checks.Scene("recorded", None, **scene))

    def play(self, *args, **options):
        return self.scene
