"""Owns what the bundled model knows by heart: each intent with its one exact answer.

Capitals, sums, names and personas are made by the corpus generator; everything else the model says is here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intent:
    """One thing a user may want to know: `asks` says it plainly, `answer` is the exact text of the model."""

    id: str
    asks: str
    answer: str


UNKNOWN = "I do not know that. I am only a tiny demo model; `rustllama pull --help` tells how to get a real one."

# fmt: off
VERBS_AND_ENDPOINTS: tuple[Intent, ...] = (
    Intent("serve", "How to start the server, and at which address it listens.",
        "Run `rustllama serve`. It listens on http://localhost:11435."),
    Intent("run", "How to chat with a model in the terminal.",
        "`rustllama run NAME` opens a chat in the terminal. Without NAME it takes the last model used, "
        "or else demo."),
    Intent("create", "How to register a GGUF file that is on disk as a model, by command or over HTTP.",
        "`rustllama create NAME PATH` registers the file. Over HTTP: POST /api/create with "
        '{"name": "NAME", "modelpath": "PATH"}.'),
    Intent("list", "How to see all registered models, by command or over HTTP.",
        "`rustllama list` shows all registered models. Over HTTP: GET /api/list, or GET /api/tags for sizes "
        "and details."),
    Intent("show", "How to see the details of one model: parameters, template, context length.",
        "`rustllama show NAME` prints the details of a model. Type `/show` in the console, or POST /api/show "
        "over HTTP."),
    Intent("rm", "How to delete a model from rustllama, and what happens to its file.",
        '`rustllama rm NAME`, or DELETE /api/delete with {"name": "NAME"}. Your own GGUF file stays; one that '
        "was pulled is deleted."),
    Intent("ps", "Which models are loaded in memory at the moment.",
        "`rustllama ps` shows the models that are in memory now. Over HTTP: GET /api/ps."),
    Intent("stop", "How to unload a model from memory at once.",
        "`rustllama stop NAME` unloads the model and frees its memory. It stays registered."),
    Intent("bench", "How to measure the speed of a server.",
        "`rustllama bench` measures time to first token and tokens per second. `--url` and `--api` point it "
        "at any server."),
    Intent("version", "Which version of rustllama is installed or running.",
        "`rustllama --version` prints the version. Over HTTP: GET /api/version."),
    Intent("help_option", "How to see all commands and the options of a command.",
        "`rustllama --help` lists the commands, and each command has its own `--help` with an example."),
    Intent("api_chat", "How to send a chat with messages over HTTP.",
        "`curl http://localhost:11435/api/chat -d "
        """'{"model":"demo","messages":[{"role":"user","content":"Hello"}]}'`"""),
    Intent("api_generate", "How to complete one plain prompt over HTTP, without a list of messages.",
        """`curl http://localhost:11435/api/generate -d '{"model":"demo","prompt":"Hello"}'`; """
        "the text is in `response`."),
    Intent("health", "How a monitor or load balancer checks that the server is healthy.",
        'GET /health answers 200 {"status":"ok"}, or 503 while the server shuts down.'),
    Intent("openai_client", "How to use OpenAI's library or its chat completions with rustllama.",
        'Set base_url="http://localhost:11435/v1" and any api_key. Chats go to POST /v1/chat/completions.'),
    Intent("openai_models", "How to list the models in OpenAI's format.",
        "GET /v1/models lists the registered models in OpenAI's format."),
    Intent("ollama_client", "How to use Ollama's client library with rustllama.",
        'Give the Ollama client host="http://localhost:11435", or set OLLAMA_HOST to that address.'),
    Intent("doctor", "What this machine has and could run, and what is wrong with the installation.",
        "`rustllama doctor` tells what this machine has, which size of model fits, how fast it would be, and "
        "what is wrong."),
    Intent("api_key", "How to let only those with an API key use the server.",
        "`rustllama key add NAME` prints a key, once. Clients send it as `Authorization: Bearer KEY`."),
    Intent("metrics", "How to watch the server over time: Prometheus, Grafana.",
        "GET /metrics has them for Prometheus. A dashboard for Grafana is in `deploy/`."),
)

REQUESTS: tuple[Intent, ...] = (
    Intent("streaming", "How to receive the answer over HTTP piece by piece.",
        'Send "stream": true and the answer comes in pieces, one JSON object a line. The default is false.'),
    Intent("stop_strings", "How to make the answer end at a given text.",
        'Send "options": {"stop": ["END"]}. The answer ends before that text, which is not shown.'),
    Intent("keep_alive", "How long a model stays loaded when nobody uses it, and how to change that.",
        'An idle model stays loaded for 5 minutes. Change it with "keep_alive": "30m", or -1 for ever.'),
    Intent("randomness", "How to control randomness: temperature, and seed for the same answer each time.",
        "Use the options `temperature` (default 0.8, 0 is not random) and `seed` (the same seed repeats "
        "the answer)."),
    Intent("num_ctx", "How to change the size of the context window.",
        "Use the option `num_ctx`. The default is what the model was trained for, at most 8,192 tokens."),
    Intent("images_and_tools", "Whether images or tool calls are supported.",
        "Not yet: a request with `images` or `tools` gets an error 400 that names the field."),
)

CONSOLE: tuple[Intent, ...] = (
    Intent("slash_set", "How to change a parameter or the system message inside the console.",
        "Type `/set parameter NAME VALUE` for an option, or `/set system TEXT` for the system message."),
    Intent("slash_clear", "How to make the console forget the conversation so far.",
        "Type `/clear`: the conversation so far is forgotten and a new one begins."),
    Intent("slash_load", "How to switch to another model inside the console.",
        "Type `/load NAME` to go on with another model."),
    Intent("slash_bye", "How to leave the console.",
        "Type `/bye`, `/exit` or `/quit`, or press Ctrl+D."),
    Intent("multi_line", "How to type a message of several lines in the console.",
        'Begin and end the message with """. Text of several lines can be pasted too.'),
    Intent("history", "Whether what is typed in the console is remembered, and how to turn that off.",
        "The console keeps what you type in a history file. `/set nohistory` turns that off."),
    Intent("ctrl_c", "What Ctrl+C does, and how to interrupt an answer that is being written.",
        "Press Ctrl+C: in the console it stops the answer and you go on chatting. In `rustllama serve` it "
        "ends the server."),
)

ERRORS: tuple[Intent, ...] = (
    Intent("model_not_found", "What the error 'model not found' means and what to do.",
        "No model has that name. Compare the spelling with `rustllama list`."),
    Intent("server_busy", "What 'server busy' with status 503 means and what to do.",
        "The queue of requests is full. Wait as long as the Retry-After header says and try again."),
    Intent("port_in_use", "What to do when the port is already in use.",
        "Another program listens there. End it, or take another port: `rustllama serve --port 11500`."),
    Intent("not_enough_memory", "What to do when a model is refused because there is not enough memory.",
        "The model is too big for the free memory. Take a smaller GGUF, or unload others with "
        "`rustllama stop`."),
    Intent("not_a_gguf", "What to do when a file is refused because it is not a GGUF.",
        "rustllama loads only GGUF files. Check the path and the format, or download the file again."),
    Intent("prompt_too_long", "What happens when the conversation is longer than the context.",
        "A chat then drops its oldest turns and says so in `warnings`. One message that is too long gets an "
        "error 400."),
    Intent("unknown_option", "What the warning 'unknown option ignored' means.",
        "rustllama has no option of that name, so it was ignored. The warning suggests the right spelling."),
    Intent("no_server", "What 'connection refused' means when using the API or a command.",
        "No server is running at that address. Start one with `rustllama serve`, then try again."),
    Intent("pull_again", "What to do when a pull was interrupted.",
        "Run the same `rustllama pull` again: it goes on where it stopped, and nothing is fetched twice."),
)

SETUP: tuple[Intent, ...] = (
    Intent("files", "Where rustllama keeps its database and other files, and how to move them.",
        "The database is in the state folder of your system, or in the folder that RUSTLLAMA_HOME names."),
    Intent("get_model", "Where to get a real, bigger model.",
        "`rustllama pull hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF llama3.2` fetches one; then "
        "`rustllama run llama3.2`."),
    Intent("gpu", "How to use a graphics card.",
        'Rebuild with `CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir '
        "llama-cpp-python` for an NVIDIA card."),
    Intent("threads", "How many CPU threads are used and how to change that.",
        "One thread for each physical core. The option `num_thread` changes that."),
    Intent("memory_limit", "How to limit the memory that the models may take.",
        "Set RUSTLLAMA_MEMORY_LIMIT. When models need more, the one idle for longest is unloaded."),
    Intent("deploy", "How to run it as a service: nginx, systemd or Docker.",
        "The folder `deploy/` has an nginx site, a systemd unit and a Dockerfile."),
    Intent("local_only", "Whether it needs the internet or sends data anywhere.",
        "Everything runs on your own machine. It needs no internet, and your data is sent nowhere."),
    Intent("license", "Under which license rustllama is, and whether it is free.",
        "rustllama is free software under the MIT license."),
    Intent("name_origin", "Why it is called rustllama, and in which language it is written.",
        "The name is a relic of a plan to write it in Rust. It is written in Python, around llama.cpp."),
)

SMALL_TALK: tuple[Intent, ...] = (
    Intent("who_are_you", "Who or what the model is.",
        "I am a tiny demo model that ships with rustllama. I know only a few things."),
    Intent("what_can_you_do", "What the model can help with.",
        "I can explain how to use rustllama, name capitals, add small numbers and answer a few "
        "simple questions."),
    Intent("hello", "A greeting.",
        "Hello! Ask me how to use rustllama."),
    Intent("how_are_you", "How the model is doing.",
        "I am fine, thank you. I am only a small program, so every day is a good day."),
    Intent("thanks", "Thanks for an answer.",
        "You are welcome!"),
    Intent("goodbye", "A farewell.",
        "Goodbye! Come back soon."),
)

GENERAL: tuple[Intent, ...] = (
    Intent("sky_blue", "Why the sky is blue.",
        "Air scatters the blue part of sunlight more than the red part, so blue light reaches us from "
        "all sides."),
    Intent("sea_salty", "Why the sea is salty.",
        "Rivers carry salts from the rocks into the sea. The water evaporates, the salt stays."),
    Intent("leaves_fall", "Why leaves turn yellow or red and fall in autumn.",
        "In autumn trees take the green pigment back, so other colours show. Then they drop the leaves to "
        "save water."),
    Intent("grass_green", "Why grass is green.",
        "Grass is full of chlorophyll, which absorbs red and blue light and reflects green."),
    Intent("moon_phases", "Why the moon changes its shape during the month.",
        "The Moon goes around the Earth, so we see more or less of its sunlit half."),
    Intent("moon_distance", "How far away the moon is.",
        "The Moon is about 384,000 km from the Earth."),
    Intent("what_is_gguf", "What a GGUF is.",
        "GGUF is the file format of llama.cpp: one file with the weights, the tokenizer and the settings of "
        "a model."),
    Intent("what_is_llm", "What a large language model is.",
        "A large language model is a neural network that learned from much text to predict the next token."),
    Intent("what_is_token", "What a token is.",
        "A token is the piece of text a model reads and writes: a word, or a part of one."),
    Intent("what_is_kv_cache", "What a KV cache is.",
        "The KV cache keeps the keys and values of earlier tokens, so that they are not computed again."),
    Intent("what_is_quantization", "What quantization is.",
        "Quantization stores the weights with fewer bits: the model gets smaller and faster, and a little "
        "less exact."),
)
# fmt: on

INTENTS: tuple[Intent, ...] = (
    *VERBS_AND_ENDPOINTS,
    *REQUESTS,
    *CONSOLE,
    *ERRORS,
    *SETUP,
    *SMALL_TALK,
    *GENERAL,
)
