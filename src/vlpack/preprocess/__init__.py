"""Preprocessing: images, videos and prompts become exactly the tensors that transformers makes, without torch."""

from vlpack.preprocess.chat_template import ChatTemplate
from vlpack.preprocess.image_source import MAX_IMAGE_PIXELS, ImageSource, load_image
from vlpack.preprocess.images import ImageProcessor, ProcessedImages, smart_resize
from vlpack.preprocess.messages import Conversation, Message, normalize_messages
from vlpack.preprocess.prompt import Prompt, PromptVideo
from vlpack.preprocess.prompt_builder import PromptBuilder
from vlpack.preprocess.tokenizer import TextStream, Tokenizer
from vlpack.preprocess.video import ProcessedVideo, VideoOptions, VideoProcessor
from vlpack.preprocess.video_decode import VideoSource, open_clip

__all__ = [
    "MAX_IMAGE_PIXELS",
    "ChatTemplate",
    "Conversation",
    "ImageProcessor",
    "ImageSource",
    "Message",
    "ProcessedImages",
    "ProcessedVideo",
    "Prompt",
    "PromptBuilder",
    "PromptVideo",
    "TextStream",
    "Tokenizer",
    "VideoOptions",
    "VideoProcessor",
    "VideoSource",
    "load_image",
    "normalize_messages",
    "open_clip",
    "smart_resize",
]
