"""The HTTP API: `create_app` puts the layers together, as a Flask application."""

from __future__ import annotations

from flask import Flask

from rustllama.api import failures
from rustllama.api.access import AccessLog
from rustllama.api.answers import Answers
from rustllama.api.blobs import Blobs
from rustllama.api.catalog import Catalog
from rustllama.api.guard import Guard
from rustllama.api.home import Home
from rustllama.api.keys import Keys
from rustllama.api.metrics import Metrics
from rustllama.api.models import Models
from rustllama.api.ollama import Ollama
from rustllama.api.openai import OpenAI
from rustllama.api.openapi import OpenAPI
from rustllama.api.prompts import Prompts
from rustllama.api.pull import PullEndpoint
from rustllama.api.pulls import Pulls
from rustllama.api.renderer import Renderer
from rustllama.engine.black_box import BlackBox
from rustllama.engine.facts import Facts
from rustllama.engine.manager import EngineFactory, EngineManager
from rustllama.model_files import ModelFiles
from rustllama.registry import Registry
from rustllama.settings import Settings


def create_app(
    settings: Settings,
    *,
    registry: Registry | None = None,
    engine_factory: EngineFactory | None = None,
    black_box: BlackBox | None = None,
) -> Flask:
    """The application of one process, with its engine manager in `extensions["rustllama"]` and its catalog in
    `extensions["rustllama_catalog"]`.

    Called in the process that serves. `black_box` is read by who watches over it. Raises SettingError where the
    registry cannot be opened.
    """
    registry = registry or Registry(settings.database_path)
    facts = Facts(registry)
    if engine_factory is None:
        from rustllama.engine.engine import LlamaEngines  # llama.cpp: only where no other engine is given

        engine_factory = LlamaEngines(settings, facts, black_box)
    manager = EngineManager(settings, engine_factory, facts)
    files = ModelFiles(settings.blobs_path)
    catalog = Catalog(settings, registry, manager, files)
    renderer = Renderer()
    if settings.load:
        renderer.start()  # while the models are loaded
    answers = Answers(catalog, manager, Prompts(renderer), engine_factory.tally, settings)
    app = Flask("rustllama", static_folder=None)
    app.extensions |= {"rustllama": manager, "rustllama_catalog": catalog}
    app.url_map.merge_slashes = False  # a redirect would be HTML
    app.wsgi_app = AccessLog(app.wsgi_app, engine_factory.tally)  # type: ignore[method-assign]
    failures.install(app)
    Guard(settings, manager, Keys(settings, registry)).install(app)
    metrics = Metrics(manager, engine_factory)
    models = (Models(catalog, manager, renderer, files), Blobs(files), PullEndpoint(Pulls(settings, catalog), manager))
    dialects = (Ollama(answers), OpenAI(answers))
    for endpoints in (Home(manager), *models, *dialects, metrics, OpenAPI(app)):
        endpoints.register(app)
    return app
