"""The loopback Hub: a strict stand-in for huggingface.co that the real huggingface_hub client talks to over HTTP.

`quantpub publish --rehearse` publishes to it, and the tests download from it. It is stricter than it need be, because a
client that passes here has promised nothing by accident. Protocol: huggingface_hub's source, hub-docs, git-lfs.

    loopback.py    LoopbackHub: what callers use
    server.py      HTTP; wire.py: request and reply; routes.py: every address by name
    reading.py, resolving.py, writing.py, committing.py, lfs.py     what the addresses do
    store.py       content and commits; git.py, attributes.py, cards.py: the rules they follow
    access.py      tokens; state.py: all of it together; faults.py: what goes wrong on order
"""

from quantpub.hub.faults import Faults
from quantpub.hub.loopback import LoopbackHub
from quantpub.hub.state import Entry

__all__ = ["Entry", "Faults", "LoopbackHub"]
