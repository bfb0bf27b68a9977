"""Values of `model_type` that exist: those of transformers 5, and of published checkpoints that
bring code of their own. Knows names only; which of them run, `registry.py` says."""

# with experts
MOE = frozenset(
    """
    afmoe arctic aria aria_text axk1 axk2 bailing_hybrid bailing_moe bailing_moe_linear
    bailing_moe_v2 beam cohere2_moe dbrx deepseek deepseek_ocr2 deepseek_ocr2_text deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl_v2 diffusion_gemma diffusion_gemma_text
    doge dots1 dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text
    exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe
    glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared grok-1 hunyuan hunyuan_v1_moe hy_v3 hy_v4 inkling2
    inkling2_text inkling_mm_model inkling_text jamba jetmoe kimi_k2 kimi_k25 kimi_linear
    kimi_vl kolibri1 laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash
    minimax minimax_m1 minimax_m2 minimax_m3_vl minimax_m3_vl_text minimax_text_01 mistral4
    mistral_large4 mistral_large4_text mixtral muse_spark muse_spark_text nemo_speechlm
    nemotron_h nemotron_h_omni nllb-moe olmoe openai_privacy_filter pangu_ultra_moe phimoe
    qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text qwen4_exp
    qwen4_exp_text solar_open step3 step3_text step3p5 step3p7 switch_transformers unlimited_ocr
    unlimited_ocr_text zaya
    """.split()
)

# without
DENSE = frozenset(
    """
    EvollaModel aimv2 albert align altclip apertus arcee audio-spectrogram-transformer
    audioflamingo3 autoformer baichuan bamba bark bart beit bert bert-generation big_bird
    bigbird_pegasus biogpt bit bitnet blenderbot blenderbot-small blip blip-2 bloom blt
    blt_global_transformer blt_patcher bridgetower bros camembert canary canine chameleon
    chatglm chinese_clip chmv2 clap clip clipseg clvp codegen cohere cohere2 cohere_asr
    cohere_compass cohere_compass_text colmodernvbert colpali colqwen2 conditional_detr convbert
    convnext convnextv2 cosmos3_edge cosmos3_edge_text cosmos3_omni cpmant csm
    csm_depth_decoder_model ctrl cvt cwm d_fine dab-detr dac data2vec-audio data2vec-text
    data2vec-vision deberta deberta-v2 decision_transformer deepseek_vl deepseek_vl_hybrid
    deformable_detr deimv2 deit depth_anything depth_pro detr dia diffllama dinat dinov2
    dinov2_with_registers dinov3_convnext distilbert donut-swin dpr dpt edgetam edgetam_video
    efficientloftr efficientnet electra embedding_gemma2 embedding_gemma2_text emu3 encodec
    encoder-decoder eomt eomt_dinov3 ernie ernie4_5 esm esmc esmfold2 eurobert evolla exaone4
    exaone4_5 falcon falcon_h1 falcon_mamba fast_vlm fastspeech2_conformer flaubert flava
    florence2 fnet focalnet fsmt fun_asr_nano funnel fuyu gemma gemma2 gemma3 gemma3_text
    gemma3n gemma3n_text gemma4_unified gemma4_unified_text git glm glm4 glm46v glm4v glm4v_text
    glm_image glm_image_text glm_ocr glm_ocr_text glmasr glmga glpn got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj gradium_phonon_tts granite
    granite4_vision_text granite_docling granite_docling_text granite_speech granite_speech5_ctc
    granite_speech_plus granite_swa grounding-dino groupvit gte helium hgnet_v2 hiera
    higgs_audio_v2 hrm_text hubert hunyuan_v1_dense hunyuan_vl hunyuan_vl_text hyperclovax
    hyperclovax_vision_v2 ibert idefics idefics2 idefics3 ijepa imagegpt informer instructblip
    instructblipvideo internlm2 internlm3 internvl internvl_chat iquestcoder jais2 janus jev
    jina_embeddings_v3 kosmos-2 kosmos-2.5 kyutai_speech_to_text lasr_ctc layoutlm layoutlmv2
    layoutlmv3 layoutxlm led levit lfm2 lfm2_vl lfm3 lfm3_vl lightglue lighton_ocr lilt llama
    llava llava_next llava_next_video llava_onevision longformer longt5 luke lw_detr lxmert
    m2m_100 mamba mamba2 marian markuplm mask2former maskformer maskformer-swin mbart
    megatron-bert metaclip_2 mgp-str mimi minicpm minicpm3 minicpm_ocr minicpmv minicpmv4_6
    minicpmv4_7 ministral ministral3 mistral mistral3 mlcd mllama mm-grounding-dino mobilebert
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 modernbert modernbert-decoder modernvbert
    molmo2 molmo2_text moonshine moonshine_streaming moshi moss_transcribe_diarize mpnet mpt mra
    mt5 muse_glimmer muse_glimmer_text musicflamingo musicgen musicgen_melody mvp nanochat
    nemotron nemotron-nas nemotron3_5_asr nemotron3_5_transcribe_word_timestamp
    nemotron3_diarization nemotron_asr_streaming neomme neucodec nomic_bert nougat nystromformer
    olmo olmo2 olmo3 olmo_hybrid omdet-turbo oneformer openai-gpt opt ovis2 owlv2 owlvit
    paddleocr_vl paddleocr_vl_text paligemma parakeet_ctc parakeet_rnnt parakeet_tdt
    patchtsmixer patchtst pe_audio_video pe_video pegasus pegasus_x perceiver perception_lm
    persimmon phi phi3 phi4_multimodal pi0 pix2struct pixio pixtral plbart pocket_tts poolformer
    pop2piano pp_chart2table pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 pp_formulanet
    pp_formulanet_text pp_lcnet pp_lcnet_v3 pp_lcnet_v4 pp_ocrv5_mobile_det pp_ocrv5_mobile_rec
    pp_ocrv5_server_det pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det
    pp_ocrv6_small_rec pp_ocrv6_tiny_rec prompt_depth_anything prophetnet pvt pvt_v2 qianfan_ocr
    qwen qwen2 qwen2_5_omni qwen2_5_omni_text qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text
    qwen3 qwen3_5 qwen3_5_text qwen3_asr qwen3_vl qwen3_vl_text radio rag recurrent_gemma
    reformer regnet rembert resnet rf_detr roberta roberta-prelayernorm roc_bert roformer
    rt_detr rt_detr_resnet rt_detr_v2 rwkv sam sam2 sam2_video sam3 sam3_lite_text sam3_tracker
    sam3_tracker_video sam3_video sam_hq sapiens2 seamless_m4t seamless_m4t_v2 seed_oss
    segformer seggpt sew sew-d shieldgemma2 siglip siglip2 slanet slanext smollm3 smolvlm
    speech-encoder-decoder speech_to_text speecht5 splinter squeezebert stablelm starcoder2
    superglue superpoint swiftformer swin swin2sr swinv2 t5 t5_gemma_module t5gemma t5gemma2
    t5gemma2_text table-transformer tapas textnet time_series_transformer timesfm timesfm2_5
    timesformer timm_wrapper tipsv2 tipsv2_dpt trocr tvp udop ultrabert ultravbert umt5
    unispeech unispeech-sat univnet upernet uvdoc vaultgemma vibevoice vibevoice_asr
    video_llama_3 video_llava videomae videomt videoprism vilt vipllava vision-encoder-decoder
    vision-text-dual-encoder visual_bert vit vit_mae vit_msn vitdet vitmatte vits vivit vjepa2
    voxtral voxtral_realtime voxtral_realtime_text wav2vec2 wav2vec2-bert wav2vec2-conformer
    wavlm whisper xclip xcodec xcodec2 xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod
    yolos yoso youtu zamba zamba2 zoedepth
    """.split()
)
