"""Options of each reward kind, typed and closed, so that a wrong recipe fails before it is submitted.

No torch here: `read_options` is called while launching as well as when the rewards are built.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.config.section import Count, NonNegative, Positive, Probability, Section


class FormatOptions(Section):
    """Reward `format`."""

    partial: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Reward of a trace that has all seven parts but is not well-formed; 0: the paper's plain 1/0."""
    min_words: Annotated[int, Field(ge=0)] = 1
    """Smallest number of words of a valid text; a shorter one counts as missing."""
    max_words: Count = 120
    """Largest number of words of a valid text; a longer one counts as missing."""
    min_distinct: Probability = 0.4
    """Smallest share of distinct words in a text of eight words or more (repetition guard)."""


class DegradationOptions(Section):
    """Reward `degradation`."""

    neighbour: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Credit for a level that is one step off (light for medium); 0: the paper's plain match."""
    blur_weight: NonNegative = 1.0
    """Weight of the blur slot; the five weights are divided by their sum. The paper weights all slots equally."""
    resize1_weight: NonNegative = 0.0
    """Weight of the first resize; 0, because no probe can read it from the LQ image (docs/rewards.md)."""
    noise_weight: NonNegative = 1.0
    """Weight of the noise slot; see `blur_weight`."""
    compression_weight: NonNegative = 1.0
    """Weight of the compression slot; see `blur_weight`."""
    resize2_weight: NonNegative = 1.0
    """Weight of the second resize slot; see `blur_weight`."""

    @property
    def slot_weights(self) -> tuple[float, ...]:
        """The weights in the order of the degradation's words."""
        return (
            self.blur_weight,
            self.resize1_weight,
            self.noise_weight,
            self.compression_weight,
            self.resize2_weight,
        )

    @model_validator(mode="after")
    def some_slot_counts(self) -> Self:
        """At least one slot has a weight above 0; else ValueError."""
        if not any(self.slot_weights):
            raise ValueError("every slot's weight is 0: raise blur_weight or another one, or drop the term")
        return self


class UnderstandingOptions(Section):
    """Reward `understanding`."""

    similarity: Literal["chrf", "minilm", "none"] = "chrf"
    """How the similarity of each text to its caption is measured; none: tags only (the paper)."""
    tags_weight: Probability = 0.5
    """Weight of the tags; the similarity has 1 minus this. Unused with similarity=none."""
    word_weight: Probability = 0.5
    """Weight of naming the word, for images that show a known word (generated signs); tags and similarity share the
    rest."""
    word_credit: Literal["exact", "letters"] = "exact"
    """exact: 1 if the rough text contains the word, else 0; letters: 1 minus the share of letters that differ."""
    synonyms: Literal["none", "wordnet", "minilm"] = "none"
    """Words that count as a tag besides the tag itself: words of its WordNet senses, or one or two words of similar
    meaning (MiniLM)."""
    wordnet_dir: str = "/usr/share/wordnet"
    """Folder with WordNet's index.noun and data.noun; only with synonyms=wordnet."""
    min_cosine: Probability = 0.7
    """Smallest cosine similarity at which words count as synonyms; only with synonyms=minilm."""


class GenerationOptions(Section):
    """Reward `generation`."""

    expert: Literal["niqe", "ranker", "pyiqa"] = "ranker"
    """Network or statistic that rates the final image."""
    weights: str | None = None
    """File of the expert; None: the one shipped under recipes/assets/tiny."""
    metrics: list[str] = []
    """pyiqa's metric names, averaged; only with expert=pyiqa."""
    weights_dir: str | None = None
    """Folder of staged pyiqa weights with its SHA256SUMS, None: weights/iqa; only with expert=pyiqa."""
    stripe_guard: bool = True
    """Reduce the reward of images that show stripes and grids, down to 0 (quality/stripes.py)."""

    @model_validator(mode="after")
    def metrics_are_pyiqas(self) -> Self:
        """Metrics are named for pyiqa, and only for it; else ValueError."""
        if (self.expert == "pyiqa") != bool(self.metrics):
            raise ValueError(
                f"expert={self.expert} with metrics={self.metrics}: only expert=pyiqa takes metrics, and needs them"
            )
        unread = "weights" if self.expert == "pyiqa" else "weights_dir"
        if getattr(self, unread) is not None:
            raise ValueError(f"{unread}={getattr(self, unread)}: expert={self.expert} does not read it; leave it out")
        return self


class FidelityOptions(Section):
    """Reward `fidelity`."""

    reference: Literal["lq", "gt"] = "lq"
    """Image that the final image is compared with. lq: the LQ image; gt: the truth."""
    degradation: Literal["downscale", "known"] = "downscale"
    """Operations on the final image before it is compared with the LQ image: area averaging to its size, or the blurs,
    resizes and JPEGs that made this LQ image from its truth. known scores 0 if they are not recorded."""
    metric: Literal["psnr", "l1", "ssim", "pyiqa"] = "psnr"
    """pyiqa: its full-reference metrics by name, at full size (reference=gt)."""
    metrics: list[str] = []
    """pyiqa's names such as lpips, dists, topiq_fr, averaged; only with metric=pyiqa."""
    weights_dir: str | None = None
    """Folder of staged pyiqa weights with its SHA256SUMS, None: weights/iqa; only with metric=pyiqa."""
    smooth_px: Annotated[float, Field(ge=0.0)] = 1.0
    """Standard deviation, in LQ pixels, of the Gaussian blur of both images before they are compared; 0: no blur."""
    psnr_low: float = 10.0
    """PSNR in dB at or below which the reward is 0."""
    psnr_high: Positive = 40.0
    """PSNR in dB at or above which the reward is 1."""

    @model_validator(mode="after")
    def options_belong_together(self) -> Self:
        """pyiqa compares with the truth; psnr_low is below psnr_high; else ValueError."""
        if (self.metric == "pyiqa") != bool(self.metrics):
            raise ValueError(
                f"metric={self.metric} with metrics={self.metrics}: only metric=pyiqa takes metrics, and needs them"
            )
        if self.metric != "pyiqa" and self.weights_dir is not None:
            raise ValueError(f"weights_dir={self.weights_dir}: metric={self.metric} does not read it; leave it out")
        if self.metric == "pyiqa" and self.reference != "gt":
            raise ValueError("metric=pyiqa compares at full size: set reference=gt")
        if self.degradation == "known" and self.reference != "lq":
            raise ValueError("degradation=known compares with the LQ image: set reference=lq")
        if self.psnr_low >= self.psnr_high:
            raise ValueError(f"psnr_low={self.psnr_low} must be below psnr_high={self.psnr_high}; swap or widen them")
        return self


class HttpOptions(Section):
    """A reward of any kind that another process computes (docs/judge.md): `expert: http` among its options."""

    expert: Literal["http"] = "http"
    """The reward is computed by another process, over HTTP."""
    url: str
    """Address that rollouts are sent to, such as http://127.0.0.1:8090/terms/generation."""
    allow_remote: bool = False
    """Required if the URL names another machine: images, captions and texts are sent there."""
    connect_timeout_s: Positive = 2.0
    """Longest wait for a connection, in seconds."""
    read_timeout_s: Positive = 60.0
    """Longest wait for a complete response, in seconds."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Further attempts if a call cannot connect, gets no response, or gets status 429, 500, 502, 503 or 504."""
    pause_s: Positive = 0.5
    """The first retry follows at once, the later ones after 2, 4, 8 ... times this, at most 30 s."""
    at_once: Count = 4
    """Concurrent calls of each rank; each sends `rewards.batch_size` rollouts."""
    token_env: str | None = None
    """Environment variable with a secret that both sides know, sent as `Authorization: Bearer ...`."""

    @model_validator(mode="after")
    def the_url_is_an_allowed_address(self) -> Self:
        """The URL is an http address without a password, local unless `allow_remote` is set; else ValueError."""
        fault = _url_fault(self.url)
        if fault:
            raise ValueError(f"url={self.url!r}: {fault}; write it as http://127.0.0.1:8090/terms/generation")
        host = urlsplit(self.url).hostname or ""
        if not self.allow_remote and not _is_loopback(host):
            raise ValueError(
                f"url={self.url!r}: would send images and texts to {host}; set allow_remote=true to allow it"
            )
        return self


def _url_fault(url: str) -> str:
    """The fault of an address; "": none."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "no http or https address of a host"
    if parts.username or parts.password or parts.query or parts.fragment or not url.isprintable() or " " in url:
        return "holds more than host, port and path (a secret goes into token_env)"
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


OPTIONS: dict[str, type[Section]] = {
    "format": FormatOptions,
    "degradation": DegradationOptions,
    "understanding": UnderstandingOptions,
    "generation": GenerationOptions,
    "fidelity": FidelityOptions,
}


def is_elsewhere(term: RewardTerm) -> bool:
    """Whether another process computes the term."""
    return term.options.get("expert") == "http"


def read_options(name: str, term: RewardTerm) -> Section:
    """Options of the term called `name`, as the typed section of its kind, or as `HttpOptions` with expert=http.

    With expert=http the kind's own options are allowed, for the process that computes the reward, but not read here.
    Raises ValueError naming every unknown or wrong option, its value and the valid names.
    """
    section, options = OPTIONS[term.kind], dict(term.options)
    if is_elsewhere(term):
        others = section.model_fields.keys() - HttpOptions.model_fields.keys()
        section, options = HttpOptions, {key: value for key, value in options.items() if key not in others}
    try:
        return section.model_validate(options)
    except ValidationError as error:
        faults = "; ".join(
            f"{fault['loc'][0]}={fault['input']!r}: {fault['msg']}" if fault["loc"] else fault["msg"]
            for fault in error.errors()
        )
        valid = ", ".join(section.model_fields)
        more = "" if section is HttpOptions else "; expert=http: another process computes it (docs/judge.md)"
        raise ValueError(
            f"rewards.terms.{name}.options (kind {term.kind}): {faults}. Valid options: {valid}{more}"
        ) from None
