"""Small tokenizers, built in code, and small text and image encoders of random weights.

Every tokenizer splits a text into characters.
"""

from string import ascii_lowercase, ascii_uppercase, digits, punctuation
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT = "a red cat"
LENGTH = 16
"""Number of tokens of a prompt with its padding."""
PIXELS = 16
"""Width and height of what image encoders take."""
CHARACTERS = [*ascii_lowercase, *ascii_uppercase, *digits, *punctuation, "\n"]
BYTES = sorted(ByteLevel.alphabet())
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LANGUAGE: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
}


def numbered(tokens: list[str]) -> dict[str, int]:
    """Return a vocabulary: the number of each token."""
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    words = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=numbered(words), merges=[], model_max_length=length)


def clip_text_config(width: int = 24, **changes: Any) -> CLIPTextConfig:
    """Return a configuration of a text encoder for `clip_tokenizer`."""
    vocabulary = 2 * len(BYTES) + 2
    settings = {
        **SIZES,
        "hidden_size": width,
        "projection_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 77,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPTextConfig(**{**settings, **changes})


def clip_text(width: int = 24, **changes: Any) -> CLIPTextModel:
    return CLIPTextModel(clip_text_config(width, **changes))


def clip_text_projected(width: int = 24, **changes: Any) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_text_config(width, **changes))


def clip_vision_config(width: int = 24, **changes: Any) -> CLIPVisionConfig:
    settings = {
        **SIZES,
        "hidden_size": width,
        "projection_dim": width,
        "image_size": PIXELS,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**{**settings, **changes})


def clip_vision(width: int = 24, **changes: Any) -> CLIPVisionModel:
    return CLIPVisionModel(clip_vision_config(width, **changes))


def clip_vision_projected(width: int = 24, **changes: Any) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(clip_vision_config(width, **changes))


def clip_images() -> CLIPImageProcessorPil:
    """Return what resizes images for the vision encoders."""
    return CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=PIXELS)


def t5_tokenizer(length: int = LENGTH) -> T5Tokenizer:
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces = [(piece, -2.0) for piece in ("▁", *CHARACTERS)]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=length)


def t5_sizes(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 4 + len(CHARACTERS),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
    }


def t5_text(width: int = 24) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**t5_sizes(width)))


def umt5_text(width: int = 24) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**t5_sizes(width)))


GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS]


def gemma_tokenizer(length: int = LENGTH) -> GemmaTokenizer:
    """Return a tokenizer whose texts are never empty, because they have a first token."""
    return GemmaTokenizer(
        vocab=numbered(GEMMA), merges=[], model_max_length=length, add_bos_token=True
    )


def gemma_text(width: int = 24) -> GemmaModel:
    return GemmaModel(GemmaConfig(**{**LANGUAGE, "hidden_size": width, "vocab_size": len(GEMMA)}))


def gemma2_text(width: int = 24) -> Gemma2Model:
    sizes = {**LANGUAGE, "hidden_size": width, "vocab_size": len(GEMMA)}
    return Gemma2Model(Gemma2Config(**sizes))


LLAMA = ["<unk>", "<s>", "</s>", "<pad>", "▁", *CHARACTERS]


def llama_tokenizer(length: int = 512) -> LlamaTokenizer:
    special = {"pad_token": "<pad>"}
    return LlamaTokenizer(vocab=numbered(LLAMA), merges=[], model_max_length=length, **special)


def llama_text(width: int = 24) -> LlamaModel:
    return LlamaModel(LlamaConfig(**{**LANGUAGE, "hidden_size": width, "vocab_size": len(LLAMA)}))


QWEN = [*BYTES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen_tokenizer(length: int = 512) -> Qwen2Tokenizer:
    """Return a tokenizer for Qwen and GLM, whose chat is the text of its first message."""
    tokenizer = Qwen2Tokenizer(vocab=numbered(QWEN), merges=[], model_max_length=length)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def qwen3_text(width: int = 24) -> Qwen3Model:
    sizes = {**LANGUAGE, "hidden_size": width, "vocab_size": len(QWEN)}
    return Qwen3Model(Qwen3Config(**sizes))


def qwen_vision_text(width: int = 24) -> Qwen2_5_VLForConditionalGeneration:
    language = {
        **LANGUAGE,
        "hidden_size": width,
        "vocab_size": len(QWEN),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=language,
            vision_config=vision,
            image_token_id=10,
            video_token_id=11,
            vision_start_token_id=12,
            vision_end_token_id=13,
        )
    )


def glm_text(width: int = 24) -> GlmModel:
    sizes = {**LANGUAGE, "hidden_size": width, "vocab_size": len(QWEN), "pad_token_id": 256}
    return GlmModel(GlmConfig(**sizes))


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]
BERT += ["##" + each for each in CHARACTERS]


def bert_tokenizer(length: int = LENGTH) -> BertTokenizer:
    return BertTokenizer(vocab=numbered(BERT), model_max_length=length)


def bert_text(width: int = 24) -> BertModel:
    return BertModel(BertConfig(**{**SIZES, "hidden_size": width, "vocab_size": len(BERT)}))


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES]


def roberta_tokenizer(length: int = LENGTH) -> RobertaTokenizer:
    return RobertaTokenizer(vocab=numbered(ROBERTA), merges=[], model_max_length=length)


def clap_text_config(width: int = 24) -> ClapTextConfig:
    sizes = {**SIZES, "hidden_size": width, "projection_dim": width, "vocab_size": len(ROBERTA)}
    return ClapTextConfig(**sizes, max_position_embeddings=64)


def clap_text_projected(width: int = 24) -> ClapTextModelWithProjection:
    return ClapTextModelWithProjection(clap_text_config(width))


def clap(width: int = 24) -> ClapModel:
    """Return encoders of text and of audio, of which pipelines call the first."""
    audio = {
        "hidden_size": 32,
        "projection_dim": width,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_mel_bins": 16,
        "spec_size": 64,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
    }
    words = clap_text_config(width).to_dict()
    return ClapModel(ClapConfig(text_config=words, audio_config=audio, projection_dim=width))


def gpt2(width: int = 24) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=64, vocab_size=32)
    )


def vocoder(mels: int = 8) -> SpeechT5HifiGan:
    """Return what makes four samples of audio of each column of a spectrogram."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=mels,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
            initializer_range=0.2,
        )
    )


def depth_estimator() -> DPTForDepthEstimation:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            image_size=PIXELS,
            patch_size=4,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            is_hybrid=False,
        )
    )


def depth_images() -> DPTImageProcessorPil:
    """Return what resizes images for the estimator of depths."""
    return DPTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
