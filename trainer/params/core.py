"""The parameters every installation has, under the names TrainTrain's users know. Modes and adapters add their own.

Attribute names are the JSON keys; `key` is given where the JSON key is odd. Tags (`needs`) a mode can carry:

folder: learns from a folder of pictures · size: uses `image_size` · trigger: puts a trigger word in front of captions ·
prompts: original and target prompt · pictures: original and target picture · pair: compares two pictures ·
pair_name: finds pairs by file name · resume: can start from an existing LoRA · te_rate: has an own rate for the text
encoder · te_train: asks whether to train the text encoder · first_pass: has a first pass that can be kept ·
second: has settings for a second pass · steps: trains by optimizer steps (given by the catalogue) · run: whatever
concerns the run as a whole (every mode, but no second pass).
"""

from __future__ import annotations

from dataclasses import dataclass

from .field import param
from .names import (
    BLOCKS,
    ELEMENTS,
    LOSS_WEIGHTINGS,
    LOSSES,
    MODEL_PRECISIONS,
    OPTIMIZERS,
    PRECISIONS,
    SAVE_PRECISIONS,
    SCHEDULERS,
    VAE_PRECISIONS,
)

# A table: a parameter is one entry of a line or two.
# fmt: off

FORMAT = 1
"""Version of the JSON files written here."""

GROUPS = ("task", "prompts", "images", "required", "blocks", "option", "2nd pass")
"""Groups in the order in which they are shown."""

TASK, PROMPTS, IMAGES, REQUIRED, BLOCK, OPTION, SECOND = GROUPS


@dataclass(frozen=True)
class Task:
    """What is trained, and on which model."""

    format: int = param(FORMAT, "Version of the settings file.", TASK, low=1, high=FORMAT)
    mode: str = param("LoRA", "Training mode.", TASK, advanced=False)
    model: str = param(
        "", "Base model to train on. Empty takes the loaded one.", TASK, advanced=False, holds="model")
    vae: str = param(
        "", "VAE to use instead of the model's own. Empty takes the one in use.", TASK, advanced=False,
        holds="vae")
    te: str = param(
        "", "Text encoder file to use instead of the model's own; for SDXL also two (clip_l;clip_g). Empty takes the"
        " model's own.", TASK, holds="te")
    original_prompt: str = param(
        "", "What the image shows before the change.", PROMPTS, key="original prompt", needs="prompts",
        advanced=False, holds="lines")
    target_prompt: str = param(
        "", "What the image shows after the change.", PROMPTS, key="target prompt", needs="prompts", advanced=False,
        holds="lines")
    original_image: str = param(
        "", "Image file before the change.", IMAGES, key="original image", needs="pictures", advanced=False,
        holds="picture")
    target_image: str = param(
        "", "Image file after the change, of the same size.",
        IMAGES, key="target image", needs="pictures", advanced=False,
        holds="picture")


@dataclass(frozen=True)
class Network:
    """The adapter: its type, its size, where it is attached."""

    network_type: str = param(
        "lierla", "Type of adapter; lierla is plain LoRA.", REQUIRED, needs="steps", advanced=False)
    network_rank: int = param(
        16, "Capacity of the adapter: a higher rank learns more, makes a larger file and overfits sooner. Usually 8 to"
        " 32.", REQUIRED, needs="steps",
        low=1, high=1024, advanced=False)
    network_alpha: float = param(
        8.0, "ΔW is scaled by alpha / rank. Usually half the rank, or 1.",
        REQUIRED, needs="steps", low=2**-5, high=1024,
        advanced=False)
    network_blocks: tuple[str, ...] = param(
        BLOCKS, "Blocks of the model that are trained; BASE is the text encoder.", BLOCK,
        key="network_blocks(BASE = TextEncoder)", choices=BLOCKS, advanced=False)
    network_targets: str = param(
        "both", "Trained part: the UNet, the text encoder or both.", OPTION, needs="steps",
        choices=("both", "unet", "text_encoder"))
    network_resume: str = param("", "LoRA file to continue training from.", OPTION, needs="resume", holds="lora")
    network_strength: float = param(
        1.0, "Factor the finished LoRA is multiplied by when it is saved; 1 leaves it as trained.",
        OPTION, low=-10, high=10)
    network_conv_rank: int = param(
        0, "Rank of the 3x3 convolutions; 0 takes network_rank.", OPTION, needs="steps", low=0, high=1024)
    network_conv_alpha: float = param(
        0.0, "Alpha of the 3x3 convolutions; 0 takes network_alpha.", OPTION, needs="steps", low=0, high=1024)
    network_element: str = param(
        "Full", "Trained layers of the UNet: all, only cross-attention (text) or only self-attention.", OPTION,
        needs="steps",
        choices=ELEMENTS)
    network_train_text_encoder: bool = param(False, "Train the text encoder too.", OPTION, needs="te_train")


@dataclass(frozen=True)
class Images:
    """The pictures and how they are cut into sizes."""

    lora_data_directory: str = param(
        "", "Folder with the training images and their caption files.", REQUIRED, needs="folder", advanced=False,
        holds="folder")
    diff_target_name: str = param(
        "", "Suffix of the target's file name, as in _b for cat.png and cat_b.png.", REQUIRED,
        needs="pair_name", advanced=False)
    lora_trigger_word: str = param(
        "", "Words put in front of every caption; use them in a prompt to call the LoRA.", REQUIRED, needs="trigger",
        advanced=False)
    image_size: tuple[int, int] = param(
        (512, 512), "Training resolution: one number, or height,width. 512 for SD 1.x, 1024 for SDXL.", REQUIRED,
        key="image_size(height, width)", needs="size", low=32, high=4096, multiple=8, unit="px", advanced=False)
    image_buckets_step: int = param(
        256, "Distance between the sides of two aspect ratio buckets; smaller crops less and makes more buckets.",
        OPTION,
        needs="folder", low=8, high=2048, multiple=8, unit="px")
    image_num_multiply: int = param(
        1, "Repeats of each image per epoch.", OPTION, needs="folder", low=1, high=10_000)
    image_min_length: int = param(
        512, "Shortest side of a bucket.", OPTION, needs="folder", low=32, high=4096, multiple=8,
        unit="px")
    image_max_ratio: float = param(
        2.0, "Largest ratio of long to short side of a bucket.", OPTION, needs="folder", low=1, high=16)
    sub_image_num: int = param(
        0, "Smaller copies of each image that are trained too; 0 adds none.", OPTION, needs="folder", low=0, high=100)
    image_mirroring: bool = param(False, "Train mirrored copies too; not for subjects whose sides differ.",
        OPTION, needs="folder")
    image_use_filename_as_tag: bool = param(False, "Take the caption from the file name instead of a text file.",
        OPTION, needs="folder")
    image_disable_upscale: bool = param(
        False, "Skip images that would have to be enlarged.", OPTION, needs="folder")
    data_skip_broken: bool = param(
        False, "Skip images that cannot be read instead of refusing to start.", OPTION,
        needs="folder")
    data_cache: str = param(
        "disk", "Where encoded images and captions are kept during training; memory is for small data sets.",
        OPTION, choices=("disk", "memory"))


@dataclass(frozen=True)
class Train:
    """How long, how fast and how exactly it is trained."""

    train_iterations: int = param(
        1000, "Number of optimizer steps; often 500 to 3000.", REQUIRED,
        needs="steps", low=0, high=10_000_000, unit="steps", advanced=False)
    train_epochs: int = param(
        0, "Number of epochs; above 0 it replaces train_iterations.", OPTION,
        needs="folder", low=0, high=1_000_000, unit="epochs")
    train_batch_size: int = param(
        2, "Images per step; more take more memory. Usually 1 to 4.",
        REQUIRED, needs="steps", low=1, high=4096, advanced=False)
    train_gradient_accumulation: int = param(
        1, "Batches whose gradients are summed before an optimizer step: a larger batch without more memory.",
        OPTION, needs="steps", low=1, high=4096, unit="batches")
    train_learning_rate: float = param(
        1e-4, "Learning rate. Usually 1e-4 for AdamW, 1 for Prodigy and D-Adaptation.", REQUIRED, needs="steps",
        low=0, high=100, advanced=False)
    train_textencoder_learning_rate: float | None = param(
        None, "Learning rate of the text encoder; empty takes train_learning_rate, 0 does not train it (in TrainTrain's"
        " files: as empty).", OPTION,
        needs="te_rate", low=0, high=100)
    train_optimizer: str = param(
        "AdamW", "Optimizer. AdamW is the usual choice; 8bit variants save memory, Prodigy finds its own rate.",
        REQUIRED, needs="steps",
        choices=OPTIMIZERS, advanced=False)
    train_optimizer_settings: str = param(
        "", "Extra arguments of the optimizer, as in betas=(0.9,0.99);weight_decay=0.01.", REQUIRED, needs="steps")
    train_lr_scheduler: str = param(
        "cosine", "Learning rate schedule. cosine or constant are the usual choices.", REQUIRED,
        needs="steps", choices=SCHEDULERS, advanced=False)
    train_lr_scheduler_settings: str = param(
        "", "Extra arguments of the schedule, as in eta_min=0.00001.", REQUIRED, needs="steps")
    train_lr_step_rules: str = param(
        "", "Factors of piecewise_constant and their last steps: 1:10,0.1:20,0.01 is 1 to step 10, 0.1 to step 20, then"
        " 0.01.", OPTION,
        needs="steps")
    train_lr_warmup_steps: int = param(
        0, "Warm-up: steps in which the learning rate rises from 0 to its full value. Often 5 % of all steps.", OPTION,
        needs="steps", low=0, high=10_000_000, unit="steps")
    train_lr_scheduler_num_cycles: int = param(
        1, "Number of cycles of schedules with restarts.", OPTION, needs="steps", low=1, high=100_000)
    train_lr_scheduler_power: float = param(
        1.0, "Exponent of the polynomial schedule; 1 is linear.", OPTION, needs="steps", low=0, high=100)
    train_max_grad_norm: float | None = param(
        None, "Gradient clipping: largest norm, 0 for none. Empty is 1, and none by TrainTrain's rules and in its"
        " files.", OPTION, needs="steps", low=0, high=1_000_000)
    train_seed: int = param(
        -1, "Random seed; -1 chooses one and logs it.", OPTION,
        needs="steps", low=-1, high=2**63 - 1)
    train_min_timesteps: int = param(
        0, "Lowest timestep that is trained (least noise).", OPTION,
        needs="steps", low=0, high=999, unit="timesteps")
    train_max_timesteps: int = param(
        1000, "End of the trained timesteps (most noise), itself not included.", OPTION, needs="steps",
        low=0, high=1000, unit="timesteps")
    train_fixed_timsteps_in_batch: bool = param(
        False, "Use one timestep for all images of a batch.", OPTION, needs="steps")
    train_loss_function: str = param(
        "MSE", "Loss function. MSE is the usual choice; L1 and Smooth-L1 weigh outliers less.",
        OPTION, needs="steps", choices=LOSSES)
    train_snr_gamma: float = param(
        5.0, "Min-SNR gamma: limits the weight of low noise. 5 is usual, 0 is off.", OPTION,
        needs="steps", low=0, high=1000)
    train_loss_weighting: str = param(
        "none", "Weight of high noise, which decides colours and shapes: debiased more, velocity most (at most 20"
        " times).", OPTION,
        needs="steps", choices=LOSS_WEIGHTINGS)
    train_clip_skip: int = param(
        1, "Clip skip: text encoder layer counted from the end. 1 is the last; 2 for most anime models.", OPTION,
        low=1, high=12, unit="layers")
    train_model_precision: str = param(
        "fp16", "Precision of the base model in memory; model keeps it as it is. fp16; bf16 if the loss becomes nan.",
        OPTION, choices=MODEL_PRECISIONS)
    train_lora_precision: str = param(
        "fp32", "Precision of the LoRA during training; fp32 is safest, bf16 and fp16 are faster on a GPU.",
        OPTION, needs="steps", choices=PRECISIONS)
    train_VAE_precision: str = param(
        "fp32", "Precision of the VAE; model keeps it as loaded. fp32 is safest.", OPTION, choices=VAE_PRECISIONS)
    use_gradient_checkpointing: bool = param(
        False, "Gradient checkpointing: much less memory, slower steps. On for SDXL with 12 GB or less.", REQUIRED,
        needs="steps")
    model_v_pred: bool = param(False, "The base model is a v-prediction model and its file does not say so.", OPTION)
    model_zero_terminal_snr: bool = param(
        False, "The base model's noise schedule ends in pure noise (zero-terminal SNR) and its file does not say so.",
        OPTION)
    train_state_every: int = param(
        100, "Steps between two saved states, from which an interrupted run resumes; 0 saves none.", OPTION,
        needs="run", low=0, high=10_000_000, unit="steps")
    train_traintrain_compatible: bool = param(
        False, "Train by TrainTrain's rules where they differ from ours. Reproduced: no clipping unless a limit is"
        " given; min-SNR weights as for epsilon with v-prediction models too; SDXL is given sizes in latents; buckets"
        " smaller than a batch are repeated; iLECO with one noise for the whole run and no anchors; no trigger word in"
        " the prompts of pairs, which keep their places when original and target are swapped; ADDifT in turns at five"
        " fixed timesteps, without a mask; Multi-ADDifT with the two prompts in place of captions, its mask the"
        " transparency of the original, not normalised. Not reproduced: the steps it adds at the end, one draw of the"
        " latents for the whole run, its resizing and the hidden colours of transparent parts, captions cut at 75"
        " tokens, the WebUI's emphasis in prompts, text encoders without their last normalisation.",
        OPTION, needs="steps")


@dataclass(frozen=True)
class Pair:
    """Settings of the modes that compare two pictures."""

    diff_alt_ratio: float = param(
        1.0, "Strength of the opposite direction, trained in the same step. 1 is equal, 0 omits it, below 0 trains it"
        " on pure noise.", OPTION,
        needs="pair", low=-10, high=10)
    diff_revert_original_target: bool = param(False, "Swap original and target.", OPTION, needs="pair")
    diff_use_diff_mask: bool = param(False, "Learn only where the two images differ.", OPTION, needs="pair")
    diff_load_1st_pass: str = param(
        "", "LoRA file to use instead of training the first pass.", OPTION, needs="first_pass", holds="lora")
    diff_save_1st_pass: bool = param(False, "Save the LoRA of the first pass too, as NAME_copy.",
        OPTION, needs="first_pass")
    diff_1st_pass_only: bool = param(False, "Stop after the first pass.", OPTION, needs="first_pass")
    use_2nd_pass_settings: bool = param(False, "Use separate settings for the second pass.", SECOND, needs="second")


@dataclass(frozen=True)
class Save:
    """What is written, when, and under which name."""

    save_lora_name: str = param(
        "", "File name of the LoRA, without extension. Empty is untitled.", REQUIRED, needs="run", advanced=False)
    save_per_steps: int = param(
        0, "Steps between two intermediate LoRA files; 0 saves none.", OPTION, needs="steps",
        low=0, high=10_000_000, unit="steps", advanced=False)
    save_per_epochs: int = param(
        0, "Epochs between two intermediate LoRA files; 0 saves none.", OPTION,
        needs="folder", low=0, high=1_000_000, unit="epochs")
    save_overwrite: bool = param(False, "Overwrite a LoRA file of the same name.", OPTION)
    save_as_json: bool = param(False, "Save these settings to a JSON file when the run starts.", OPTION, needs="run")
    save_precision: str = param("fp16", "Precision of the LoRA file; fp16 is small and enough.",
        OPTION, choices=SAVE_PRECISIONS)
    save_metadata: str = param(
        "full", "Training information written into the LoRA file; never a path of your machine.", OPTION,
        needs="run", choices=("full", "minimal", "none"))


@dataclass(frozen=True)
class Export:
    """In which form the adapter is written."""

    export_format: str = param(
        "auto", "Save as plain LoRA: always (lora), never (native), or where a WebUI needs it and the error is small"
        " (auto).",
        OPTION, needs="steps", choices=("auto", "lora", "native"))
    export_rank: int = param(
        0, "Rank of the plain LoRA that other types are saved as; 0 takes the trained rank.", OPTION,
        needs="steps", low=0, high=1024)
    export_max_error: float = param(
        0.05, "Largest error of a plain LoRA, as a share of ΔW, up to which auto uses it.", OPTION,
        needs="steps", low=0, high=1)


@dataclass(frozen=True)
class Log:
    """What is told during a run, and to whom."""

    logging_save_csv: bool = param(True, "Log the losses to a CSV file, which Plot shows.", OPTION, needs="run")
    logging_verbose: bool = param(False, "Log more details.", OPTION, needs="run")
    logging_trackers: tuple[str, ...] = param(
        (), "Programs that the losses are also logged to.", OPTION, needs="run", choices=("tensorboard", "wandb"))


@dataclass(frozen=True)
class Sample:
    """Previews that are drawn during training."""

    sample_prompts: str = param(
        "", "Prompts of the samples, one per line; may end with --n negative, --w width, --h height, --s steps, --d"
        " seed, --l CFG.", OPTION, needs="run", holds="lines")
    sample_every: int = param(
        0, "Steps between two sets of sample images; 0 generates none.", OPTION,
        needs="run", low=0, high=10_000_000, unit="steps")
    sample_steps: int = param(
        20, "Sampling steps of a sample image; 20 is usual.", OPTION, needs="run", low=1, high=1000, unit="steps")
    sample_cfg: float = param(7.0, "CFG scale of the sample images; 7 is usual.", OPTION, needs="run", low=0, high=100)
    sample_seed: int = param(0, "Random seed of the sample images.", OPTION, needs="run", low=0, high=2**63 - 1)


OF_THE_RUN: tuple[type, ...] = (Task, Images, Pair, Log, Sample)
"""Sections that concern a run as a whole: a second pass has none of its own."""

SECTIONS: tuple[type, ...] = (Task, Network, Images, Train, Pair, Save, Export, Log, Sample)
"""The core sections, in the order of the files and of the reference page."""
