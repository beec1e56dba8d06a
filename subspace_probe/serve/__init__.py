"""A guard behind HTTP: the moderation endpoint that OpenAI's clients call. Needs the extra `[serve]`."""

from importlib.util import find_spec

from subspace_probe.core.errors import MissingExtra

if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
    raise MissingExtra(f"The server needs {', '.join(missing)}. Install: pip install 'subspace-probe[serve]'")
