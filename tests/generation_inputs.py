"""What the tests of generation share: calls, ends and a streamer that keeps what it hears."""

SAMPLED = dict(top_k=0, top_p=0.9, temperature=1.5)


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.put_in.append(value)

    def end(self):
        self.ended = True


def text_of(model, ids, new, **options):
    return model.generate(ids, ids.shape[1] + new, **options)


def a_token_of(text, row, at):
    """A token that the row has there for the first time."""
    token = text[row, at].item()
    assert token not in text[row, :at].tolist()
    return token
